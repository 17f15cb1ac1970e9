"""Looks over a drafter's shoulder: every tree it proposed, and every row it ran through the head for it."""
from dataclasses import dataclass, field

from torch import Tensor

from draft import Eagle2
from drafters.eagle1 import Eagle1
from tree import State, Tree


@dataclass
class Call:
    """One run of the head over some rows."""
    tokens: list[int]
    given: Tensor  # [rows, C]: what fc makes of a token and a feature
    rope_pos: list[int]
    cache_pos: list[int]
    seen: list[set[int]]  # the cache slots that each row attends to


@dataclass
class Cycle:
    """One proposal: `length` and `committed` as the drafter found them."""
    length: int
    committed: int
    calls: list[Call] = field(default_factory=list)
    tree: Tree | None = None


class Recorder:
    def __init__(self, drafter: Eagle1 | Eagle2) -> None:
        self.drafter, self.cycles = drafter, []
        self.original_rows, self.original_propose = drafter.rows, drafter.propose
        drafter.rows, drafter.propose = self.rows, self.propose

    def rows(self, tokens: Tensor, onward: Tensor, above: Tensor | None, rope_pos: Tensor, cache_pos: Tensor,
             mask: Tensor) -> Tensor:
        if self.cycles and self.cycles[-1].tree is None:  # within propose, not within prefill
            seen = [set(row.nonzero().flatten().tolist()) for row in mask]
            given = self.drafter.embedded[tokens] + (onward if above is None else onward[above])
            self.cycles[-1].calls.append(Call(tokens.tolist(), given, rope_pos.tolist(), cache_pos.tolist(), seen))
        return self.original_rows(tokens, onward, above, rope_pos, cache_pos, mask)

    def propose(self, state: State) -> Tree:
        self.cycles.append(Cycle(int(state.length), int(state.committed)))
        self.cycles[-1].tree = self.original_propose(state)
        return self.cycles[-1].tree
