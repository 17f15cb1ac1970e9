"""Records every tree that an EAGLE drafter proposes, and every row that its head processes for it."""
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from draft import Eagle2
from drafters.eagle1 import Eagle1
from ops.attention import TreeMask
from tree import State, Tree


@dataclass
class Call:
    """One run of the head."""
    tokens: list[int]
    given: Tensor  # [rows, any]: what the first layer reads
    rope_pos: list[int]
    cache_pos: list[int]
    seen: list[set[int]]  # the cache slots that each row attends to


@dataclass
class Cycle:
    """One call of propose. `length` and `committed` are the state's at its beginning."""
    length: int
    committed: int
    calls: list[Call] = field(default_factory=list)
    tree: Tree | None = None  # None until propose has returned


class Recorder:
    """Replaces `predict` of this drafter's head and its `propose` by methods that record and call the originals."""

    def __init__(self, drafter: Eagle1 | Eagle2) -> None:
        self.drafter = drafter
        self.cycles: list[Cycle] = []
        self.original_predict = drafter.bound.predict
        self.original_propose = drafter.propose
        drafter.bound.predict = self.predict
        drafter.propose = self.propose

    def predict(self, tokens: Tensor, inputs: Tensor, parent_rows: Tensor | None, rope_pos: Tensor,
            cache_pos: Tensor, mask: Tensor | TreeMask) -> Tensor:
        within_propose = self.cycles and self.cycles[-1].tree is None  # else prefill runs the head
        if within_propose:
            dense = mask.dense(len(tokens), self.drafter.head.rope.shape[1]) if isinstance(mask, TreeMask) else mask
            seen = [set(row.nonzero().flatten().tolist()) for row in dense]
            share = inputs if parent_rows is None else inputs[parent_rows]
            given = self.first_input(tokens, share)
            self.cycles[-1].calls.append(Call(tokens.tolist(), given, rope_pos.tolist(), cache_pos.tolist(), seen))
        return self.original_predict(tokens, inputs, parent_rows, rope_pos, cache_pos, mask)

    def first_input(self, tokens: Tensor, inputs: Tensor) -> Tensor:
        bound = self.drafter.bound
        if hasattr(bound, "fc_of_token"):
            return bound.fc_of_token[tokens] + inputs
        layer = bound.head.layers[0]
        size, eps = layer.embed_norm.weight.shape, layer.embed_norm.eps
        return torch.cat((F.rms_norm(bound.table[tokens], size, layer.embed_norm.weight, eps),
                          F.rms_norm(inputs, size, layer.feature_norm.weight, eps)), -1)

    def propose(self, state: State) -> Tree:
        cycle = Cycle(int(state.length), int(state.committed))
        self.cycles.append(cycle)
        cycle.tree = self.original_propose(state)
        return cycle.tree
