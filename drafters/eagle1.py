"""EAGLE-1: a fixed tree, filled by the EAGLE head (arXiv 2401.15077)."""
import torch
from torch import Tensor

from draft import Eagle, EagleHead
from model import Llama
from ops.attention import tree_mask
from tree import State, Tree, build, root

# The EAGLE authors' fixed tree `mc_sim_7b_63` (their repository, eagle/model/choices.py): 25 drafted nodes,
# each the path of ranks that leads to it. (0, 1) is the second-best token after the best one.
EAGLE1_TREE = [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
               (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
               (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)]


class Eagle1(Eagle):
    """EAGLE's fixed tree: which nodes exist and which are fed is known in advance, only the tokens are not."""

    def __init__(self, head: EagleHead, target: Llama, choices: list[tuple[int, ...]] = EAGLE1_TREE) -> None:
        super().__init__(head, target, max(map(len, choices)))
        device = target.embed.weight.device
        nodes = sorted([(), *choices], key=lambda path: (len(path), path))  # level order, the root first
        self.num_nodes = len(nodes)
        parents = torch.tensor([0] + [nodes.index(path[:-1]) for path in nodes[1:]], device=device)
        self.shape = build(torch.zeros_like(parents), parents, self.max_depth)
        fed = [path for path in nodes[1:] if any(c[:-1] == path for c in choices)]  # in scratch-slot order
        self.where = torch.tensor([[len(path) - 2 for path in fed], [slot - 1 for slot in range(len(fed))]],
                                  dtype=torch.int64, device=device)
        self.levels = []  # for each depth of fed nodes: their tensors, see `propose`
        self.grow = [self.places([c for c in nodes if len(c) == 1], [()], device)]
        for depth in range(1, self.max_depth):
            here = [path for path in fed if len(path) == depth]
            above = [path for path in fed if len(path) == depth - 1] or [()]
            at_depth = [path for path in nodes if len(path) == depth]
            self.levels.append((
                torch.tensor([at_depth.index(path) for path in here], device=device),
                torch.tensor([above.index(path[:-1]) for path in here], device=device),
                torch.tensor([[sum(1 << j for j, other in enumerate(fed) if path[:len(other)] == other)]
                              for path in here], device=device),
                slice(fed.index(here[0]), fed.index(here[-1]) + 1)))
            self.grow.append(self.places([c for c in nodes if len(c) == depth + 1], here, device))

    @staticmethod
    def places(children: list[tuple[int, ...]], fed: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """[2, children]: the row of each child's parent among the fed nodes, and the child's rank."""
        return torch.tensor([[fed.index(c[:-1]) for c in children], [c[-1] for c in children]], device=device)

    def propose(self, state: State) -> Tree:
        hidden, where = self.extend(state)
        logits, onward = self.read(hidden, not self.levels)
        levels = [self.children(logits, state, 0)]
        for depth, (fed, parent_rows, bits, at) in enumerate(self.levels, 1):
            places, slots = where[:, at]
            hidden = self.rows(levels[-1][fed], onward, parent_rows, places, slots,
                               tree_mask(where[0, 0], bits, state.width))
            logits, onward = self.read(hidden, depth == len(self.levels))
            levels.append(self.children(logits, state, depth))
        return self.shape._replace(tokens=torch.cat((root(state), *levels)))

    def children(self, logits: Tensor, state: State, depth: int) -> Tensor:
        rows, ranks = self.grow[depth]
        best = self.steps.best_tokens(logits, min(10, logits.shape[-1]), self.ids, self.noise(state, depth))
        return best[rows, ranks]
