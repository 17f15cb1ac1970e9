"""Records every tree that an EAGLE drafter proposes, and every row that its head processes for it."""
from dataclasses import dataclass, field

from torch import Tensor

from draft import Eagle2
from drafters.eagle1 import Eagle1
from tree import State, Tree


@dataclass
class Call:
    """One run of the head."""
    tokens: list[int]
    given: Tensor  # [rows, C]: fc's output for each row's token and feature
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
    """Replaces `run_head` and `propose` of this one drafter by methods that record and then call the originals."""

    def __init__(self, drafter: Eagle1 | Eagle2) -> None:
        self.drafter = drafter
        self.cycles: list[Cycle] = []
        self.original_run_head = drafter.run_head
        self.original_propose = drafter.propose
        drafter.run_head = self.run_head
        drafter.propose = self.propose

    def run_head(self, tokens: Tensor, fc_of_feature: Tensor, parent_rows: Tensor | None, rope_pos: Tensor,
                 cache_pos: Tensor, mask: Tensor) -> Tensor:
        within_propose = self.cycles and self.cycles[-1].tree is None  # else prefill runs the head
        if within_propose:
            seen = [set(row.nonzero().flatten().tolist()) for row in mask]
            share = fc_of_feature if parent_rows is None else fc_of_feature[parent_rows]
            given = self.drafter.fc_of_token[tokens] + share
            self.cycles[-1].calls.append(Call(tokens.tolist(), given, rope_pos.tolist(), cache_pos.tolist(), seen))
        return self.original_run_head(tokens, fc_of_feature, parent_rows, rope_pos, cache_pos, mask)

    def propose(self, state: State) -> Tree:
        cycle = Cycle(int(state.length), int(state.committed))
        self.cycles.append(cycle)
        cycle.tree = self.original_propose(state)
        return cycle.tree
