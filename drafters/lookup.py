"""Drafting from the text itself: what followed the last time these words stood there? No weights, no forward.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --lookup --prompt @report.txt

The end of the text is looked for in the text before it, and what came after it is proposed as a chain. Three rules:

    longest  the longest match of at most 16 tokens, of equally long ones the latest; a chain that reaches the end of
             the text begins again where it began, so that a text that repeats itself is drafted in full
    pld      prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding): 3, else 2, else 1 tokens, the
             first match; all of the chain must be there, and the match must not be the end itself
    hf       transformers' prompt_lookup_num_tokens: 2, else 1 tokens, the first match; the chain may be cut short

EAGLE-2 can let a retrieved chain compete with its own candidates: how likely a chain is to go on is known from the
length of its match.
"""
import math

import torch
from torch import Tensor

from draft import Drafter
from ops.device import pdl_options, tl, triton, wait_for_previous_kernel
from tree import State, Tree, build_tree

RULES = {"longest": 16, "pld": 3, "hf": 2}  # the most tokens that a match may have
# How often the next token was what followed the latest match of 1, 2, ... tokens: in 32,000 tokens that the demo model
# wrote at temperature 1, beginning from nothing
CONFIDENCE = (0.1, 0.25, 0.4, 0.55, 0.6, 0.7, 0.7, 0.7, 0.7, 0.7, 0.8)


class Retrieval:
    """Finds the chain of `length` tokens that the text suggests."""

    def __init__(self, length: int, rule: str = "longest", device: torch.device | str = "cpu") -> None:
        if rule not in RULES or not 1 <= length <= 16:
            raise ValueError(f"a retrieved chain has 1 to 16 tokens and one of the rules {', '.join(RULES)}")
        self.length, self.rule, self.longest = length, rule, RULES[rule]
        last = len(CONFIDENCE) - 1
        steps = [[math.log(CONFIDENCE[min(match + i, last)]) for i in range(length)] for match in range(self.longest)]
        scores = torch.tensor([[-math.inf] * length, *steps], device=device)
        self.scores = scores.cumsum(1)  # [match + 1, length] fp32: log-probability of a chain up to each node

    def write(self, state: State, tokens: Tensor, scores: Tensor | None = None) -> None:
        """Fill tokens [length + 1] int64 with the newest token and the chain, scores [length] fp32 with what the chain
        promises. Where there is nothing to propose, tokens are ~0, which nobody accepts, and scores -inf."""
        if tokens.is_cuda:
            self.write_triton(state, tokens, scores)
        else:
            self.write_torch(state, tokens, scores)

    def write_torch(self, state: State, tokens: Tensor, scores: Tensor | None) -> None:
        text, n = state.tokens[:state.width], state.length
        place = torch.arange(len(text), device=text.device)
        run, match = place < n - 1, torch.zeros_like(place)
        for j in range(self.longest):  # does what ends at `place` equal the end of the text, j + 1 tokens of it?
            run = run & (text.roll(j) == text[(n - 1 - j).clamp(min=0)]) & (place >= j)
            match = match + run
        if self.rule == "pld":
            match = torch.minimum(match, n - place - 2).clamp(min=0) * (place + 1 + self.length <= n)
        key = (match << 32) + (place if self.rule == "longest" else len(text) - 1 - place)
        best = key.argmax()
        found, offset = match[best], torch.arange(self.length, device=text.device)
        if self.rule == "longest":
            offset = offset % (n - 1 - best).clamp(min=1)
        at = best + 1 + offset
        chain = torch.where((found > 0) & (at < n), text[at.clamp(max=len(text) - 1)], ~0)
        tokens.copy_(torch.cat((text[n - 1][None], chain)))
        if scores is not None:
            scores.copy_(self.scores[found])

    def write_triton(self, state: State, tokens: Tensor, scores: Tensor | None) -> None:
        retrieve_kernel[1,](state.tokens, state.length, tokens, scores, self.scores, self.length, self.longest,
                            self.rule == "longest", self.rule == "pld", 1024, num_warps=8,
                            **pdl_options(tokens.device))


@triton.jit
def retrieve_kernel(text, length, tokens, scores, table, K: tl.constexpr, LONGEST: tl.constexpr,
                    LATEST: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """See Retrieval.write. One program: a text of 4,000 tokens is four blocks, and a block's loads are all under way
    at once."""
    wait_for_previous_kernel(PDL)
    n, best = tl.load(length), tl.full((), -1, tl.int64)
    for start in range(0, n - 1, BLOCK):
        place = start + tl.arange(0, BLOCK)
        match, run = tl.zeros([BLOCK], tl.int64), place < n - 1
        for j in tl.static_range(LONGEST):
            end = tl.load(text + n - 1 - j, mask=n > j, other=-1)
            run &= (tl.load(text + place - j, mask=(place >= j) & (place < n), other=-2) == end)
            match += run
        if WHOLE:
            match = tl.where(place + 1 + K <= n, tl.maximum(tl.minimum(match, n - place - 2), 0), 0)
        key = (match << 32) + (place if LATEST else 0x7FFFFFFF - place)
        best = tl.maximum(best, tl.max(key, 0))
    found, low = best >> 32, best & 0xFFFFFFFF
    place, k = low if LATEST else 0x7FFFFFFF - low, tl.arange(0, 16)
    at = place + 1 + (k % tl.maximum(n - 1 - place, 1) if LATEST else k)
    real = (found > 0) & (at < n) & (k < K)
    tl.store(tokens, tl.load(text + n - 1))
    tl.store(tokens + 1 + k, tl.load(text + at, mask=real, other=-1), mask=k < K)
    if scores is not None:
        tl.store(scores + k, tl.load(table + tl.maximum(found, 0) * K + k, mask=k < K), mask=k < K)


class Lookup(Drafter):
    """The retrieved chain alone."""
    has_blocked_nodes = True

    def __init__(self, device: torch.device | str = "cpu", length: int = 10, rule: str = "longest") -> None:
        self.retrieval, self.num_nodes, self.max_depth = Retrieval(length, rule, device), length + 1, length
        parents = (torch.arange(length + 1, device=device) - 1).clamp(min=0)
        self.shape = build_tree(torch.zeros_like(parents), parents, length)

    def propose(self, state: State) -> Tree:
        self.retrieval.write(state, self.shape.tokens)
        return self.shape
