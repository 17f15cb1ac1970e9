"""Draft trees as a few small tensors: growing them, reranking them, masks, noise, and what is accepted.

Pure functions of static shape: no model, no cache, no loop over candidates, no value ever read by the host.
They run unchanged on a CPU, on a GPU and inside a CUDA graph.

A tree of T <= 64 nodes is three vectors: `tokens`, `parents`, `depth`. Node 0 is the root, the newest
committed token; parents[i] < i. Then a node's ancestors, itself included, are the bits of one int64.

        root                 node     0   1   2   3   4
        /  \\                 parent   0   0   0   1   1
       1    2                depth    0   1   1   2   2
      / \\                    bits     1  11 101 1011 10011   (bit j: node j is an ancestor)
     3   4
"""
from typing import NamedTuple

import torch
from torch import Tensor

MAX_NODES = 64  # the bits of an int64


class Tree(NamedTuple):
    tokens: Tensor  # [T] int64
    parents: Tensor  # [T] int64, parents[0] = 0
    depth: Tensor  # [T] int64
    ancestors: Tensor  # [T] int64, bit j of ancestors[i]: node i is node j or descends from it


def build(tokens: Tensor, parents: Tensor, max_depth: int) -> Tree:
    """A Tree from its tokens and parents [T]. `max_depth` (static) bounds the depth of any node."""
    own = torch.ones_like(parents) << torch.arange(len(parents), device=parents.device)
    ancestors, depth, node = own, torch.zeros_like(parents), parents
    for _ in range(max_depth):
        ancestors = ancestors | own[node]
        depth = depth + (node > 0)  # hops left before the root; the root's parent is itself
        node = parents[node]
    return Tree(tokens, parents, depth + (torch.arange(len(parents), device=parents.device) > 0), ancestors)


def sees(tree: Tree) -> Tensor:
    """Bool [T, T]: node i attends to node j, an ancestor or itself."""
    return (tree.ancestors[:, None] >> torch.arange(len(tree.tokens), device=tree.tokens.device)) & 1 == 1


def tree_mask(sees: Tensor, base: Tensor, width: int) -> Tensor:
    """Bool [rows, width] over cache slots: all before `base` (0-d), and node j's slot base + j where sees[row, j]."""
    node = torch.arange(width, device=sees.device) - base  # negative in the prefix
    inside = (node >= 0) & (node < sees.shape[1])
    return (node < 0) | (sees.index_select(1, node.clamp(0, sees.shape[1] - 1)) & inside)


def causal_mask(first: Tensor | int, rows: int, width: int, device: torch.device) -> Tensor:
    """Bool [rows, width]: row i is the token in slot first + i and sees the slots up to its own."""
    row = torch.arange(rows, device=device)[:, None] + first
    return torch.arange(width, device=device) <= row


def best_children(logits: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each node's k most probable next tokens. logits [N, V], scores [N] (log-probability of each path so far)
    -> tokens [N, k] and the scores of the paths they extend, [N, k] fp32.

    fp32, because a half-precision path score near -8 cannot tell its children apart. log p is rounded to at
    most 0, so a child never scores above its parent: `rerank` relies on that.
    """
    logits = logits.float()
    top, tokens = logits.topk(k, dim=-1)
    log_p = (top - logits.logsumexp(-1, keepdim=True)).clamp(max=0)
    return tokens, scores[:, None] + log_p


def best_first(scores: Tensor, n: int) -> Tensor:
    """Indices of the n highest of scores [N], best first, the earlier one at a tie (torch.topk keeps any)."""
    return scores.sort(descending=True, stable=True).indices[:n]


def rerank(root: Tensor, tokens: Tensor, parents: Tensor, scores: Tensor, n: int, max_depth: int) -> Tree:
    """EAGLE-2's last step (arXiv 2406.16858, 4.2): of all N candidates keep the n most probable, as one tree.

    root 0-d; tokens, parents, scores [N], level by level; parents are candidate indices, -1 under the root.
    A parent comes before its child and never scores lower, and the sort is stable, so whoever is kept has its
    parent kept too. Ascending order of the kept indices is level order. Returns a Tree of n + 1 nodes.
    """
    kept = best_first(scores, n).sort().values  # [n] candidate indices
    node_of = torch.zeros(len(scores) + 1, dtype=torch.int64, device=scores.device)  # the last entry serves parent -1
    node_of[kept] = torch.arange(1, n + 1, device=scores.device)
    new_parents = node_of[parents[kept]]
    return build(torch.cat((root[None], tokens[kept])), torch.cat((new_parents.new_zeros(1), new_parents)), max_depth)


def accept(tree: Tree, next_tokens: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The longest drafted path that the target itself would have written.

    next_tokens [T]: the target's choice after each node. A node is accepted when each node on its path is the
    choice made after its parent; siblings differ, so at each depth at most one is. Returns
      path [max_depth + 1] int64: the accepted nodes in order, root first; beyond them, the last one repeated
      accepted: 0-d int64, how many drafted tokens (the root not counted)
      out [max_depth + 1] int64: the tokens to commit, the bonus token last; entries beyond `accepted` repeat it
    """
    index = torch.arange(len(tree.tokens), device=tree.tokens.device)
    wrong = (tree.tokens != next_tokens[tree.parents]) & (index > 0)
    wrong_bits = (wrong.long() << index).sum()  # bits are distinct, so the sum is their union
    depth = torch.where((tree.ancestors & wrong_bits) == 0, tree.depth, -1)
    last = depth.argmax()
    steps = torch.arange(max_depth + 1, device=index.device)
    on_path = ((tree.ancestors[last] >> index) & 1) == 1
    at_depth = on_path & (tree.depth == steps[:, None])  # [max_depth + 1, T], at most one node a row
    path = torch.where(at_depth.any(1), at_depth.int().argmax(1), last)
    return path, depth[last], next_tokens[path]


def process(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """logits [T, V] -> fp32 logits of the distribution to sample from; excluded tokens are -inf.
    Order and meaning of transformers' warpers: temperature, top-k, top-p, min-p. Off: 0, 1 and 0."""
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(stable=True)  # ascending, as transformers sorts: ties go the same way
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def gumbel_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise [N, V] fp32 that depends on (seed, position, token) alone. seed 0-d, positions [N].

    argmax(logits + noise) samples the softmax. Because the noise belongs to the place in the text, not to the
    call, the token chosen there is the same however many drafts were verified along with it: for one seed,
    sampled text is the same with and without speculation (the idea: arXiv 2408.07978).
    """
    token = torch.arange(vocab_size, device=positions.device)
    h = mix32(mix32(seed & 0xFFFFFFFF) ^ mix32((seed >> 32) & 0xFFFFFFFF ^ 0x5BD1E995))
    h = mix32(h + positions)[:, None]  # [N, 1]
    h = mix32(mix32(h ^ token))  # [N, V]
    # -log(-log(1 - u)) with u near 0 for the winners: fp32 resolves u to 2^-32 there, and only 2^-24 near 1
    u = ((h.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # never 1: an infinite loser ties with the excluded
    return -torch.log(-torch.log1p(-u))


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that avalanches (constants of Chris Wellons' lowbias32), held in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def choose(logits: Tensor, noise: Tensor | None, **sampling: float) -> Tensor:
    """The target's next token after each row, [T]: argmax, or a sample where `noise` [T, V] is given."""
    if noise is None:
        return logits.argmax(-1)
    return (process(logits, **sampling) + noise).argmax(-1)
