"""Drafting from the text itself: what followed when these words stood in the text before? No weights, no forward.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --lookup --prompt @report.txt

The last tokens of the text are looked up in the text before them, and what followed there is proposed as a chain.
There are three rules:

    longest  the longest match of at most 16 tokens, and the latest of equally long ones. A chain that reaches the end
             of the text starts again at its first token, so a text that repeats itself is drafted in full.
    pld      prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): the first match of 3 tokens, else
             of 2, else of 1. The text must have all tokens of the chain, and the chain must begin before the tokens
             that were looked up.
    hf       transformers' prompt_lookup_num_tokens: the first match of 2 tokens, else of 1. The chain may be shorter.

EAGLE-2's tree and block drafters can let such a chain compete with their own candidates. Its scores depend on the
length of the match (CONFIDENCE).
"""
import math

import torch
from torch import Tensor

from draft import Drafter
from ops.device import pdl_options, tl, triton, wait_for_previous
from tree import State, Tree, chain_tree

RULES = {"longest": 16, "pld": 3, "hf": 2}  # the most tokens that a match may have
# How often the token that followed the latest match of 1, 2, ... tokens was the next one: in 32,000 tokens that the
# demo model wrote at temperature 1, starting from an empty text
CONFIDENCE = (0.1, 0.25, 0.4, 0.55, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.8)


class Retrieval:
    """Finds the chain of `length` tokens that the text suggests. ValueError for an unknown rule or another length than
    1 to 16."""

    def __init__(self, length: int, rule: str = "longest", device: torch.device | str = "cpu") -> None:
        if rule not in RULES or not 1 <= length <= 16:
            raise ValueError(f"a retrieved chain has 1 to 16 tokens and one of the rules {', '.join(RULES)}")
        self.length = length
        self.max_match = RULES[rule]
        self.latest_match = rule == "longest"  # else the first of equally long matches, and no chain starts again
        self.whole_chain = rule == "pld"  # else a chain may be cut short, and a match may overlap the last tokens
        # A token that is accepted makes the match one token longer, and the next token more likely.
        last = len(CONFIDENCE) - 1
        log_p = [[math.log(CONFIDENCE[min(match - 1 + i, last)]) for i in range(length)]
                 for match in range(1, self.max_match + 1)]
        no_match = [-math.inf] * length
        # [max_match + 1, length] fp32: for each length of the match, the log-probability of the chain up to each token
        self.scores = torch.tensor([no_match, *log_p], device=device).cumsum(1)

    def write(self, state: State, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Find the chain and write it into the caller's tensors, in place: a CUDA graph reads and writes the same
        tensors each time, and these may be parts of larger ones.

        tokens [length + 1] int64: the newest token, then the chain; where there is nothing to propose, ~0, which is
        never accepted. scores [length] fp32: the log-probability of the chain up to each token; -inf where there is no
        token.
        """
        if tokens.is_cuda:
            self.write_triton(state, tokens, scores)
        else:
            self.write_torch(state, tokens, scores)

    def write_torch(self, state: State, tokens: Tensor, scores: Tensor | None) -> None:
        text = state.tokens[:state.width]
        n = state.length
        end = torch.arange(len(text), device=text.device)  # index of a match's last token
        equal = end < n - 1
        match = torch.zeros_like(end)  # length of the match that ends there
        for j in range(self.max_match):  # are the last j + 1 tokens equal?
            equal = equal & (text.roll(j) == text[(n - 1 - j).clamp(min=0)]) & (end >= j)
            match = match + equal
        if self.whole_chain:
            match = torch.minimum(match, n - end - 2).clamp(min=0) * (end + 1 + self.length <= n)
        key = (match << 32) + (end if self.latest_match else len(text) - 1 - end)  # the longest first, then by place
        best = key.argmax()
        best_match = match[best]
        offset = torch.arange(self.length, device=text.device)
        if self.latest_match:
            offset = offset % (n - 1 - best).clamp(min=1)
        source = best + 1 + offset
        found = (best_match > 0) & (source < n)
        chain = torch.where(found, text[source.clamp(max=len(text) - 1)], ~0)
        tokens.copy_(torch.cat((text[n - 1][None], chain)))
        if scores is not None:
            scores.copy_(torch.where(found, self.scores[best_match], -math.inf))

    def write_triton(self, state: State, tokens: Tensor, scores: Tensor | None) -> None:
        retrieve_kernel[1,](state.tokens, state.length, tokens, scores, self.scores, self.length, self.max_match,
                            self.latest_match, self.whole_chain, 1024, num_warps=8,
                            **pdl_options(tokens.device))


@triton.jit
def retrieve_kernel(text, length, tokens, scores, table, K: tl.constexpr, MAX_MATCH: tl.constexpr,
                    LATEST_MATCH: tl.constexpr, WHOLE_CHAIN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Retrieval.write on a GPU. text [S + 1] int64, length 0-d int64, tokens [K + 1] int64, scores [K] fp32 or None,
    table: Retrieval.scores. Grid: one program. A text of 4,000 tokens is four blocks of BLOCK = 1024, and all loads of
    a block are under way at once. The best match is kept as one int64: its length above 32 bits of its place."""
    wait_for_previous(PDL)
    n = tl.load(length)
    best = tl.full((), -1, tl.int64)
    for start in range(0, n - 1, BLOCK):
        end = start + tl.arange(0, BLOCK)  # index of a match's last token
        equal = end < n - 1
        match = tl.zeros([BLOCK], tl.int64)
        for j in tl.static_range(MAX_MATCH):
            last = tl.load(text + n - 1 - j, mask=n > j, other=-1)
            equal &= (tl.load(text + end - j, mask=(end >= j) & (end < n), other=-2) == last)
            match += equal
        if WHOLE_CHAIN:
            match = tl.where(end + 1 + K <= n, tl.maximum(tl.minimum(match, n - end - 2), 0), 0)
        key = (match << 32) + (end if LATEST_MATCH else 0x7FFFFFFF - end)
        best = tl.maximum(best, tl.max(key, 0))
    best_match = best >> 32
    place = best & 0xFFFFFFFF
    end = place if LATEST_MATCH else 0x7FFFFFFF - place
    k = tl.arange(0, 16)
    source = end + 1 + (k % tl.maximum(n - 1 - end, 1) if LATEST_MATCH else k)
    found = (best_match > 0) & (source < n) & (k < K)
    tl.store(tokens, tl.load(text + n - 1))
    tl.store(tokens + 1 + k, tl.load(text + source, mask=found, other=-1), mask=k < K)
    if scores is not None:
        log_p = tl.load(table + tl.maximum(best_match, 0) * K + k, mask=k < K)
        tl.store(scores + k, tl.where(found, log_p, -float("inf")), mask=k < K)


class Lookup(Drafter):
    """Drafts the retrieved chain and nothing else."""
    has_blocked_nodes = True

    def __init__(self, device: torch.device | str = "cpu", length: int = 10, rule: str = "longest") -> None:
        self.retrieval = Retrieval(length, rule, device)
        self.num_nodes = length + 1
        self.max_depth = length
        self.tree = chain_tree(length, device)

    def propose(self, state: State) -> Tree:
        self.retrieval.write(state, self.tree.tokens)
        return self.tree
