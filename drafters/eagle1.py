"""EAGLE-1 (arXiv 2401.15077): a fixed tree, filled in by the EAGLE head.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle --prompt "Hello!"

Which nodes there are, and which are fed to the head, is known beforehand; only their tokens are not.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from draft import Eagle, EagleHead
from model import Llama
from ops.attention import tree_mask
from tree import Path, State, Tree, fixed_tree, root_token

# The EAGLE authors' tree `mc_sim_7b_63` (their repository, eagle/model/choices.py): 25 drafted nodes, each given as the
# path of ranks that leads to it. (0, 1) is the best token's second-best continuation.
EAGLE1_TREE = [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
               (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
               (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)]


class Fed(NamedTuple):
    """The nodes of one depth that are fed to the head, because they have children."""
    nodes: Tensor  # [k] int64, which of the tree's nodes of this depth they are
    parent_rows: Tensor  # [k] int64, each one's parent among the rows that were fed before
    visible: Tensor  # [k, 1] int64, bit s: the node sees scratch slot s
    scratch: slice  # their scratch slots


class Eagle1(Eagle):
    """`choices`: the paths of ranks that lead to the tree's nodes."""

    def __init__(self, head: EagleHead, target: Llama, choices: list[Path] = EAGLE1_TREE) -> None:
        super().__init__(head, target, max(map(len, choices)))
        device = target.embed.weight.device
        nodes, self.tree = fixed_tree(choices, device)
        self.num_nodes = len(nodes)
        parents = {path[:-1] for path in nodes[1:]}
        fed = [path for path in nodes[1:] if path in parents]  # in the order of their scratch slots
        # Relative to the length of the text, as in Eagle2: the head's position is one before the token's
        self.scratch = torch.tensor([[len(path) - 2 for path in fed], [slot - 1 for slot in range(len(fed))]],
                                    dtype=torch.int64, device=device)
        self.levels = []  # what is fed at each depth, from 1 on
        self.children = []  # below the nodes fed at each depth, from 0 on: [2, n], parent's row and own rank
        above = [()]
        for depth in range(self.max_depth):
            children = [path for path in nodes if len(path) == depth + 1]
            self.children.append(torch.tensor([[above.index(path[:-1]) for path in children],
                                               [path[-1] for path in children]], device=device))
            here = [path for path in fed if len(path) == depth + 1]
            if here:
                visible = [sum(1 << slot for slot, other in enumerate(fed) if path[:len(other)] == other)
                           for path in here]
                self.levels.append(Fed(
                    torch.tensor([children.index(path) for path in here], device=device),
                    torch.tensor([above.index(path[:-1]) for path in here], device=device),
                    torch.tensor(visible, device=device)[:, None],
                    slice(fed.index(here[0]), fed.index(here[-1]) + 1)))
            above = here

    def propose(self, state: State) -> Tree:
        predicted, scratch = self.extend(state)
        logits, inputs = self.bound.read_logits(predicted, not self.levels)
        tokens = [self.best_children(logits, state, 0)]
        for depth, fed in enumerate(self.levels, 1):
            positions, slots = scratch[:, fed.scratch]
            mask = tree_mask(scratch[0, 0], fed.visible, state.width)
            predicted = self.bound.predict(tokens[-1][fed.nodes], inputs, fed.parent_rows, positions, slots, mask)
            logits, inputs = self.bound.read_logits(predicted, depth == len(self.levels))
            tokens.append(self.best_children(logits, state, depth))
        return self.tree._replace(tokens=torch.cat((root_token(state), *tokens)))

    def best_children(self, logits: Tensor, state: State, depth: int) -> Tensor:
        """The tokens, [n] int64, of all nodes below the k nodes fed at this depth. logits [k, Vd]."""
        rows, ranks = self.children[depth]
        best = self.tree_ops.best_tokens(logits, min(10, logits.shape[-1]), self.ids, self.noise(state, depth))
        return best[rows, ranks]
