"""Draft trees as a few small tensors: growing a tree, choosing its nodes, accepting a path, committing it.

Every function has static shapes, never reads a value on the host and knows no model. On a GPU, ops/tree.py does the
steps of a cycle in fewer kernels, under the same names and with the same results.

A tree of T <= 128 nodes is three vectors: `tokens`, `parents` and `depth`. Node 0 is the root, the newest committed
token, and parents[i] < i. The ancestors of a node, the node itself included, are the bits of one int64, or of two:

        root                 node        0   1   2    3     4
        /  \\                 parent      0   0   0    1     1
       1    2                depth       0   1   1    2     2
      / \\                    ancestors   1  11 101 1011 10011   (binary; bit j: node j is an ancestor)
     3   4

Shapes: T nodes of a tree, N drafted candidates, V tokens of the vocabulary, S cache slots, C hidden size, D head size.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_NODES = 128  # the bits of two int64
Path = tuple[int, ...]  # a node of a fixed tree, as ranks: (0, 1) is the best token's second-best continuation


class Tree(NamedTuple):
    tokens: Tensor  # [T] int64; a node that must never be accepted holds ~token, which is negative
    parents: Tensor  # [T] int64, parents[0] = 0
    depth: Tensor  # [T] int64
    ancestors: Tensor  # [T, W] int64, W = 1 for T <= 64, else 2; bit j of row i (see `bit`): j is i or an ancestor of i


@dataclass
class State:
    """One sequence while it is decoded. Everything is on the device except `width` and `sampling`."""
    tokens: Tensor  # [S + 1] int64; the first `length` are committed; the last of these is the next root
    length: Tensor  # 0-d int64: committed tokens. The last one, the root, has no entry in the target's KV cache yet
    hidden: Tensor  # [max_depth + 1, C or k * C]: the target's features or taps; row i: before the i-th new token
    committed: Tensor  # 0-d int64: tokens committed by the last cycle alone; only as many rows of `hidden` are valid
    done: Tensor  # 0-d bool: a stop id or the length limit was reached; further cycles change nothing
    width: int  # cache slots that PyTorch's attention reads on a CPU: an upper bound on every slot in use
    noise: Tensor | None = None  # [noise_depth + 1, V] fp32: what sampling adds to the logits of the next positions
    seed: Tensor | None = None  # 0-d int64
    sampling: object = None  # a sampling.Sampling; nothing in this file reads it


class Level(NamedTuple):
    """The nodes that the head is fed next, best first: k drafted nodes, or the root alone."""
    tokens: Tensor  # [k] int64
    scores: Tensor  # [k] fp32, log-probability of the path to each node
    index: Tensor  # [k] int64, which candidate each node is; -1 for the root
    parent_rows: Tensor  # [k] int64, each node's parent among the rows that were fed before
    visible: Tensor  # [k, 2] int64, bit s: the node sees scratch slot s. Node i at depth d has slot (d - 1) k + i


class Candidates(NamedTuple):
    """All drafted nodes. EAGLE-2's come level by level, siblings best first: N = k + (levels - 1) k^2. Those of `grid`
    come depth by depth, best first: N = D n. Then come `retrieved` more entries, or none: an unused one for the newest
    token (never kept), and a chain found in the text, whose first token is a child of the root."""
    tokens: Tensor  # [N] int64
    scores: Tensor  # [N] fp32, log-probability of the path to each
    parents: Tensor  # [N] int64, indices of candidates; -1 under the root
    retrieved: int = 0


# ----- Making trees ------------------------------------------------------------------------------------------------


def root_token(state: State) -> Tensor:
    """The newest committed token, [1] int64."""
    return state.tokens.index_select(0, (state.length - 1)[None])


def bit(i: Tensor, words: int) -> Tensor:
    """For each i of [N] int64, a row of `words` int64 in which one bit is set: bit i % 64 of word i // 64."""
    i = i[:, None]
    return torch.where(i >> 6 == torch.arange(words, device=i.device), torch.ones_like(i) << (i & 63), 0)


def build_tree(tokens: Tensor, parents: Tensor, max_depth: int) -> Tree:
    """A Tree from its tokens and parents [T]. `max_depth` bounds the depth of every node."""
    node = torch.arange(len(parents), device=parents.device)
    ancestors = own = bit(node, 1 if len(node) <= 64 else 2)
    depth = (node > 0).long()
    above = parents
    for _ in range(max_depth):
        ancestors = ancestors | own[above]
        depth = depth + (above > 0)  # the root's parent is the root itself: it adds nothing
        above = parents[above]
    return Tree(tokens, parents, depth, ancestors)


def fixed_tree(paths: list[Path], device: torch.device | str) -> tuple[list[Path], Tree]:
    """The nodes of these paths of ranks in level order, the root () first, and their Tree, with tokens still to be
    filled in. ValueError if the parent of a path, path[:-1], is missing."""
    nodes = sorted({(), *paths}, key=lambda path: (len(path), path))
    parents = torch.tensor([0] + [nodes.index(path[:-1]) for path in nodes[1:]], device=device)
    return nodes, build_tree(torch.zeros_like(parents), parents, len(nodes[-1]))


def chain_tree(length: int, device: torch.device | str) -> Tree:
    """The root and `length` nodes, each below the one before; the tokens are still to be filled in."""
    parents = (torch.arange(length + 1, device=device) - 1).clamp(min=0)
    return build_tree(torch.zeros_like(parents), parents, length)


# ----- Drafting a dynamic tree (EAGLE-2, arXiv 2406.16858) -----------------------------------------------------------


def catch_up(state: State, n: int, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a head needs to process the tokens just committed, always as n rows.

    scratch [2, any] int64: RoPE positions and cache slots of the drafted nodes, relative to the length of the text.
    Returns, all int64: the tokens [n] that follow each feature; the positions [n] of the features; the row [1] of the
    last feature that counts; `scratch` with the length added."""
    positions = state.length - state.committed - 1 + torch.arange(n, device=scratch.device)
    last_row = (state.committed - 1)[None]
    return state.tokens[positions + 1], positions, last_row, state.length + scratch


def start_tree(k: int, levels: int, device: torch.device, retrieved: int = 0) -> tuple[Level, Candidates]:
    """The level that is the root alone, with score 0, and room for the candidates of `levels` levels and of a chain."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    root = Level(zero, zero.float(), zero - 1, zero, zero.new_zeros(1, 2))
    return root, empty_candidates(k + (levels - 1) * k * k, device, retrieved)


def empty_candidates(drafted: int, device: torch.device, retrieved: int = 0) -> Candidates:
    """Room for so many drafted candidates and for a retrieved chain."""
    tokens, parents = torch.arange(-1, drafted + retrieved - 1, device=device).repeat(2, 1)  # of a chain: i - 1
    parents[drafted:drafted + 2] = -1
    return Candidates(tokens, torch.full((drafted + retrieved,), -torch.inf, device=device), parents, retrieved)


def grow(logits: Tensor, level: Level, candidates: Candidates, depth: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> Level:
    """Give each node of `level` its k best continuations, and store them in `candidates`. Returns the k best of all.

    logits [rows, V] of the nodes of `level`, which lie `depth` below the root. Column i is token ids[i], or without
    `ids` token i. noise [all tokens] fp32 is added to every row."""
    tokens, scores = best_children(add_noise(logits, ids, noise), level.scores, k)
    tokens = (tokens if ids is None else ids[tokens]).flatten()
    scores = scores.flatten()
    first = k + (depth - 1) * k * k if depth else 0  # candidates of the levels above
    stored = slice(first, first + len(tokens))
    candidates.tokens[stored] = tokens
    candidates.scores[stored] = scores
    candidates.parents[stored] = level.index.repeat_interleave(k)
    best = best_first(scores, k)
    own = bit(torch.arange(depth * k, (depth + 1) * k, device=logits.device), 2)
    parent_rows = best // k
    return Level(tokens[best], scores[best], first + best, parent_rows, level.visible[parent_rows] | own)


def grid(logits: Tensor, candidates: Candidates, n: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> None:
    """For logits that depend on the depth alone, not on the path: store the n best nodes of each depth in `candidates`,
    best first. logits [D, V] and ids as in `grow`; noise [D or more, all tokens] fp32, row d for depth d + 1.

    Parents and tokens are ranked from 0. Child r of parent i scores no higher than (i + 1)(r + 1) - 1 other nodes of
    its depth, so pairs with (i + 1)(r + 1) > n need not be looked at. `rerank` then picks the best tree.
    """
    rows, device = len(logits), logits.device
    logits = add_noise(logits, ids, None if noise is None else noise[:rows])
    tokens, log_p = best_children(logits, torch.zeros(rows, device=device), k)
    tokens = tokens if ids is None else ids[tokens]
    pairs = [(i, r) for i in range(n) for r in range(k) if (i + 1) * (r + 1) <= n]
    parent, rank = torch.tensor(pairs, device=device).T
    scores = torch.tensor([0.0] + (n - 1) * [-torch.inf], device=device)  # the root is the only node above
    index = torch.full((n,), -1, device=device)
    for d in range(rows):
        children = scores[parent] + log_p[d, rank]
        best = best_first(children, n)
        stored = slice(d * n, (d + 1) * n)
        candidates.tokens[stored] = tokens[d, rank[best]]
        candidates.scores[stored] = scores = children[best]
        candidates.parents[stored] = index[parent[best]]
        index = torch.arange(d * n, (d + 1) * n, device=device)


def rerank(state: State, candidates: Candidates, n: int, max_depth: int) -> Tree:
    """The n most probable candidates as a tree of n + 1 nodes under the newest committed token (EAGLE-2, section 4.2).

    A parent is stored before its children and never scores lower, and the sort is stable: so the parent of every kept
    node is kept too, and ascending indices are level order."""
    tokens, scores, parents = candidates[:3]
    kept = best_first(scores, n).sort().values
    node_of = torch.zeros(len(scores) + 1, dtype=torch.int64, device=scores.device)  # last entry: parent -1
    node_of[kept] = torch.arange(1, n + 1, device=scores.device)
    new_parents = node_of[parents[kept]]
    return build_tree(torch.cat((root_token(state), tokens[kept])),
                      torch.cat((new_parents.new_zeros(1), new_parents)), max_depth)


def best_children(logits: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Each node's k most probable next tokens: tokens [rows, k] int64, and the scores of the paths they extend
    [rows, k] fp32. logits [rows, V], scores [rows].

    In fp32, since a half-precision path score near -8 cannot tell its children apart. log p is at most 0 after
    rounding, so that no child scores above its parent: `rerank` relies on it."""
    logits = logits.float()
    top, tokens = logits.topk(k, dim=-1)
    log_p = (top - logits.logsumexp(-1, keepdim=True)).clamp(max=0)
    return tokens, scores[:, None] + log_p


def best_tokens(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """The k most probable tokens of each row of logits [rows, V], best first: [rows, k] int64. ids, noise: see grow."""
    best = add_noise(logits, ids, noise).topk(k).indices
    return best if ids is None else ids[best]


def add_noise(logits: Tensor, ids: Tensor | None, noise: Tensor | None) -> Tensor:
    return logits if noise is None else logits + (noise if ids is None else noise[..., ids])


def best_first(scores: Tensor, n: int) -> Tensor:
    """Indices of the n highest of scores [N], best first; at a tie the lower index (torch.topk takes any)."""
    return scores.sort(descending=True, stable=True).indices[:n]


# ----- After verification ------------------------------------------------------------------------------------------


def argmax(logits: Tensor) -> Tensor:
    """The most probable token of each row of logits [T, V]: [T] int64."""
    return logits.argmax(-1)


def accept(tree: Tree, next_tokens: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The longest drafted path that the target itself would have written.

    next_tokens [T] int64: the target's choice after each node. A node is accepted if every node on its path is what the
    target chose after that node's parent. Siblings may be equal (one drafted, one retrieved), so several nodes of a
    depth may be accepted: the path leads to the deepest one, at a tie the first. Returns
      path [max_depth + 1] int64: the accepted nodes in order, the root first; then the last one repeated
      accepted, 0-d int64: how many drafted tokens were accepted (the root does not count)
      out [max_depth + 1] int64: the tokens to commit, the bonus token last; entries beyond `accepted` repeat it"""
    node = torch.arange(len(tree.tokens), device=tree.tokens.device)
    own = bit(node, tree.ancestors.shape[1])
    wrong = (tree.tokens != next_tokens[tree.parents]) & (node > 0)
    wrong_bits = (own * wrong[:, None]).sum(0)  # the bits are distinct, so their sum is their union
    depth = torch.where(((tree.ancestors & wrong_bits) == 0).all(1), tree.depth, -1)
    last = depth.argmax()
    on_path = ((tree.ancestors[last] & own) != 0).any(1)
    steps = torch.arange(max_depth + 1, device=node.device)
    at_depth = on_path & (tree.depth == steps[:, None])  # [max_depth + 1, T], at most one node a row
    path = torch.where(at_depth.any(1), at_depth.int().argmax(1), last)
    return path, depth[last], next_tokens[path]


def accept_commit(tree: Tree, next_tokens: Tensor, state: State, stop_ids: Tensor, limit: Tensor, max_depth: int,
                  report: Tensor) -> Tensor:
    """Accept a path and append its tokens to the text, up to the first of `stop_ids` [any] or the length `limit` (0-d).

    Changes state.tokens, length, committed and done in place. Once `done` is set, it commits nothing and leaves the
    text's tokens, length and `committed` as they are; entries after the text may change. Returns `accept`'s path.
    Fills report [max_depth + 3] int64 for the host: how many tokens were committed, whether the text has ended, and the
    tokens (only the committed ones count)."""
    path, accepted, out = accept(tree, next_tokens, max_depth)
    steps = torch.arange(len(out), device=out.device)
    state.tokens.index_copy_(0, state.length + steps, out)
    is_stop = (out[:, None] == stop_ids).any(1)
    first_stop = torch.where(is_stop, steps, len(out)).amin()
    count = torch.minimum(torch.minimum(accepted, first_stop) + 1, limit - state.length)
    count = torch.where(state.done, 0, count)
    state.length.add_(count)
    state.committed.copy_(torch.where(state.done, state.committed, count))
    state.done.logical_or_((first_stop < count) | (state.length >= limit))
    report.copy_(torch.cat((torch.stack((count, state.done.long())), out)))
    return path


def compact(kv: Tensor, base: Tensor, path: Tensor, hidden: Tensor, kept: Tensor) -> None:
    """Move accepted keys and values right after the text's: slots base + path[j] of kv [..., S, D] to base + j. Copy
    hidden[path] to kept [max_depth + 1, C]. base 0-d int64, path [max_depth + 1] int64, hidden [T, C] (taps: k * C)."""
    slots = base + torch.arange(len(path), device=path.device)
    kv.index_copy_(-2, slots, kv.index_select(-2, base + path))  # gathered first: source and destination overlap
    kept.copy_(hidden[path])
