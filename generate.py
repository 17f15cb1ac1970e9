"""Generate text with a Llama, one sequence on one device, as fast as it goes; with EAGLE-2 the same text faster.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --compare \\
        --prompt "Explain how a bicycle stays upright."

Each cycle a drafter proposes a tree of continuations (draft.py), one forward of the target over all its nodes
says what the target would have written after each, and the longest path that agrees is committed, with one
bonus token (tree.py). Vanilla decoding is the same cycle with a tree of one node. Lengths, positions and masks
live on the device; the host reads back what was committed and nothing else.

Text goes to stdout as it is written, statistics to stderr; with --json the last line of stdout is one object.
"""
import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draft import Eagle1, Eagle2, State, load_head
from model import Llama, load_model
from tokenizer import Tokenizer
from tree import Tree, accept, causal_mask, choose, gumbel_noise, sees, tree_mask

PREFILL_CHUNK = 512  # prompt tokens a forward
SPARE = 128  # cache slots past max_seq_len, for drafts that reach beyond the last token to be committed
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. The same seed gives the same text,
    whatever the drafter."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Vanilla:
    """No draft: the root alone."""
    num_nodes, max_depth, scratch = 1, 0, 0

    def prefill(self, tokens: Tensor, features: Tensor, first: int) -> None:
        pass

    def propose(self, state: State) -> Tree:
        root = state.tokens.index_select(0, (state.length - 1)[None])
        zero = torch.zeros_like(root)
        return Tree(root, zero, zero, zero + 1)


class Engine:
    """A model, a drafter and the state of one sequence. Call `generate` again and again, one at a time."""

    def __init__(self, model: Llama, drafter: Vanilla | Eagle1 | Eagle2, max_seq_len: int,
                 stop_ids: frozenset[int] = frozenset()) -> None:
        self.model, self.drafter, self.max_seq_len = model, drafter, max_seq_len
        self.device = model.embed.weight.device
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.slots = max_seq_len + SPARE
        if model.kv is None or model.kv.shape[4] < self.slots:
            model.allocate_cache(max_seq_len, SPARE)
        if not isinstance(drafter, Vanilla):
            drafter.head.allocate_cache(self.slots)

    @torch.inference_mode()
    def prefill(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> State:
        """Process the prompt and commit the first new token. Raises ValueError where it does not fit."""
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(ids)} tokens, but the context is --max_seq_len {self.max_seq_len} and "
                             f"must hold at least one more (the model was made for "
                             f"{self.model.cfg.max_position_embeddings})")
        n, device = len(ids), self.device
        self.sampling = sampling
        self.seed = torch.tensor(sampling.seed, device=device)
        self.limit = torch.tensor(min(n + max_new_tokens, self.max_seq_len), device=device)
        tokens = torch.zeros(self.slots, dtype=torch.int64, device=device)
        tokens[:n] = torch.tensor(ids, device=device)
        for a in range(0, n, PREFILL_CHUNK):
            b = min(a + PREFILL_CHUNK, n)
            slots = torch.arange(a, b, device=device)
            features = self.model(tokens[None, a:b], slots, slots, causal_mask(a, b - a, b, device))[0]
            known = min(b, n - 1)  # entry i of the head wants token i + 1; the last one is not chosen yet
            if known > a:
                self.drafter.prefill(tokens[a + 1:known + 1], features[:known - a], a)
        state = State(tokens, torch.tensor(n, device=device), features.new_zeros(self.drafter.max_depth + 1,
                      features.shape[1]), torch.tensor(0, device=device), torch.tensor(False, device=device), self.slots)
        first = self.choose(features[-1:], state.length[None])
        self.commit(state, torch.tensor(0, device=device), first)
        state.features[0] = features[-1]
        return state

    def choose(self, features: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """The target's next token [T] after each of features [T, C]. `positions` [N]: the places these tokens
        will take, one entry per distinct place; rows [T] says which place belongs to which feature."""
        logits, s, noise = self.model.lm_head(features), self.sampling, None
        if s.temperature > 0:
            noise = gumbel_noise(self.seed, positions, logits.shape[-1])
            noise = noise if rows is None else noise[rows]
        return choose(logits, noise, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)

    @torch.inference_mode()
    def cycle(self, state: State) -> None:
        """Draft, verify, accept, commit. Once `state.done`, a cycle changes nothing."""
        base, device = state.length - 1, self.device
        tree = self.drafter.propose(state)
        slots = base + torch.arange(len(tree.tokens), device=device)
        mask = tree_mask(sees(tree), base, state.width)
        features = self.model(tree.tokens[None], base + tree.depth, slots, mask)[0]
        places = state.length + torch.arange(self.drafter.max_depth + 1, device=device)
        path, accepted, out = accept(tree, self.choose(features, places, tree.depth), self.drafter.max_depth)
        if len(tree.tokens) > 1:  # the accepted rows move to the front; gathered first, for the slots overlap
            kept = base + torch.arange(len(path), device=device)
            self.model.kv.index_copy_(4, kept, self.model.kv.index_select(4, base + path))
        self.commit(state, accepted, out)
        state.features = features[path]

    def commit(self, state: State, accepted: Tensor, out: Tensor) -> None:
        """Append out[: accepted + 1], cut after the first stop id and at the length limit."""
        steps = torch.arange(len(out), device=self.device)
        state.tokens.index_copy_(0, state.length + steps, out)
        is_stop = (out[:, None] == self.stop_ids).any(1)
        first_stop = torch.where(is_stop, steps, len(out)).amin()
        count = torch.minimum(torch.minimum(accepted, first_stop) + 1, self.limit - state.length)
        count = torch.where(state.done, 0, count)
        state.length = state.length + count
        state.committed = count
        state.done = state.done | (first_stop < count) | (state.length >= self.limit)

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling = Sampling()) -> Iterator[list[int]]:
        """Yield the new token ids, cycle by cycle: first the one that prefill chose, then what each cycle
        committed. Ends after a stop id (yielded too), max_new_tokens, or a full context."""
        state, length, done = self.prefill(ids, max_new_tokens, sampling), len(ids), False
        while True:
            now, done = int(state.length), bool(state.done)
            yield state.tokens[length:now].tolist()
            if done:
                return
            length = now
            if self.device.type == "cpu":  # on a CPU attention over unused slots costs time; on CUDA, new shapes do
                state.width = min(-(-(length + SPARE) // 128) * 128, self.slots)
            self.cycle(state)
