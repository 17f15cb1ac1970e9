"""What the engine asks of a drafter, and the plainest one, which drafts nothing.

Once a cycle a drafter proposes a tree of continuations; the engine verifies it, and that alone decides the text. So a
drafter can be slow or wrong, but never change what is written. On a GPU all of a cycle is one CUDA graph: `propose` and
`learn` work on tensors of static shape, change tensors in place, and never look at a value.

    lookup.py     the text itself: what followed there before
    lookahead.py  the target, which guesses places ahead of the text, and the n-grams that come of it
    medusa.py     heads that guess several tokens ahead at once
    speculate.py  a smaller language model
    draft.py      EAGLE's head: one layer that guesses features
"""
from types import ModuleType

import torch
from torch import Tensor

import tree
import tree_kernels
from kernels import TreeMask
from tree import State, Tree, root


def steps(device: torch.device) -> ModuleType:
    """The small steps of a cycle: tree.py's, or on a GPU the kernels of the same names."""
    return tree_kernels if device.type == "cuda" else tree


class Drafter:
    """To make one: set `num_nodes` and `max_depth`, write `propose`, and of the rest whatever it needs."""
    num_nodes = 1  # of each tree, the root included; at most tree.MAX_NODES
    max_depth = 0  # of the nodes that may be accepted
    deepest: int | None = None  # of all nodes, where some lie deeper than that
    blanks = False  # whether there are nodes that must never be accepted: one of token t holds ~t, which is below 0
    rejection = False  # whether `choose` takes the place of sampling with noise that belongs to the place in the text

    def allocate(self, slots: int) -> None:
        """Make room for a context of so many slots. Engines may share a drafter: keep what is large enough."""

    def caches(self) -> tuple[Tensor, ...]:
        """What `allocate` may replace: graphs that were captured with others are thrown away."""
        return ()

    def reset(self, state: State) -> None:
        """A new text: state.tokens up to state.length are the prompt, which goes through `prefill` next."""

    def prefill(self, state: State, features: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        """A chunk of the prompt: features [T, C] of the tokens in `slots` [T] of state.tokens, which see each other as
        `mask` says. What lies past the prompt's end is anything."""

    def propose(self, state: State) -> Tree:
        """The tree to verify. Node 0 is the root, the newest committed token."""
        raise NotImplementedError

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        """After verification, before anything is committed: next_tokens [T] are the target's choices after each node,
        whether it will be accepted or not."""

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        """With `rejection`, when sampling: the choice after each node, [T] int64, of logits [T, V] fp32 of the
        distribution to sample from."""
        raise NotImplementedError


class Vanilla(Drafter):
    """No draft: the root alone."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.shape = Tree(zero, zero, zero, zero + 1)

    def propose(self, state: State) -> Tree:
        return self.shape._replace(tokens=root(state))
