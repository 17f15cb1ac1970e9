"""Draft trees as a few small tensors: growing them, reranking them, masks, and what is accepted.

Functions of static shape: no model, no loop over candidates, no value ever read by the host. They run on a CPU and
on a GPU, where tree_kernels.py does the steps of a cycle in fewer kernels, under the same names, with the same results.

A tree of T <= 64 nodes is three vectors: `tokens`, `parents`, `depth`. Node 0 is the root, the newest
committed token; parents[i] < i. Then a node's ancestors, itself included, are the bits of one int64.

        root                 node     0   1   2   3   4
        /  \\                 parent   0   0   0   1   1
       1    2                depth    0   1   1   2   2
      / \\                    bits     1  11 101 1011 10011   (bit j: node j is an ancestor)
     3   4
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_NODES = 64  # the bits of an int64


class Tree(NamedTuple):
    tokens: Tensor  # [T] int64
    parents: Tensor  # [T] int64, parents[0] = 0
    depth: Tensor  # [T] int64
    ancestors: Tensor  # [T] int64, bit j of ancestors[i]: node i is node j or descends from it


@dataclass
class State:
    """One sequence being decoded, all of it on the device. Only `width` is a Python number: how many cache slots
    PyTorch's attention looks at on a CPU, a bound on everything this cycle touches."""
    tokens: Tensor  # [S + 1] int64, committed up to `length`; tokens[length - 1] is the root, not yet in the KV cache
    length: Tensor  # 0-d int64
    features: Tensor  # [max_depth + 1, C], the target's features of the places before the tokens just committed
    committed: Tensor  # 0-d int64, how many tokens the last cycle committed; that many rows of `features` count
    done: Tensor  # 0-d bool: a stop id or the length limit was reached, further cycles change nothing
    width: int
    noise: Tensor | None = None  # [deepest + 1, V] fp32: what sampling adds to the logits of the next places
    seed: Tensor | None = None  # 0-d int64
    sampling: object = None  # a sampling.Sampling, which nothing in this file looks at


def root(state: State) -> Tensor:
    """The newest committed token, [1] int64."""
    return state.tokens.index_select(0, (state.length - 1)[None])


def build(tokens: Tensor, parents: Tensor, max_depth: int) -> Tree:
    """A Tree from its tokens and parents [T]. `max_depth` (static) bounds the depth of any node."""
    own = torch.ones_like(parents) << torch.arange(len(parents), device=parents.device)
    ancestors, depth, node = own, torch.zeros_like(parents), parents
    for _ in range(max_depth):
        ancestors = ancestors | own[node]
        depth = depth + (node > 0)  # hops left before the root; the root's parent is itself
        node = parents[node]
    return Tree(tokens, parents, depth + (torch.arange(len(parents), device=parents.device) > 0), ancestors)


def catch_up(state: State, n: int, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a drafter that reads features begins with. Of the n places from the first of the features that verification
    has just left: the tokens that follow [n], the places [n], and [1] which of these is the last that counts. And
    `where` [2, any], which counts from the end of the text, as places."""
    places = state.length - state.committed - 1 + torch.arange(n, device=where.device)
    return state.tokens[places + 1], places, (state.committed - 1)[None], state.length + where


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


def noisy(logits: Tensor, ids: Tensor | None, noise: Tensor | None) -> Tensor:
    return logits if noise is None else logits + (noise if ids is None else noise[ids])


def best_first(scores: Tensor, n: int) -> Tensor:
    """Indices of the n highest of scores [N], best first, the earlier one at a tie (torch.topk keeps any)."""
    return scores.sort(descending=True, stable=True).indices[:n]


class Level(NamedTuple):
    """The drafted nodes that the head is fed next, best first: k of them, or the root alone."""
    tokens: Tensor  # [k] int64
    scores: Tensor  # [k] fp32, log-probability of the path to each
    index: Tensor  # [k] int64, which candidate each is; -1 for the root
    rows: Tensor  # [k] int64, each one's parent among the rows fed before
    bits: Tensor  # [k, 2] int64, bit s: it attends to scratch slot s. Node i of depth d has slot (d - 1) k + i


class Candidates(NamedTuple):
    """All drafted nodes, level by level, siblings best first: N = k + (max_depth - 1) k^2. And perhaps a chain that
    came from elsewhere, behind a copy of the root that nobody keeps."""
    tokens: Tensor  # [N] int64
    scores: Tensor  # [N] fp32
    parents: Tensor  # [N] int64, candidate indices; -1 under the root


def start(k: int, max_depth: int, device: torch.device, chain: int = 0) -> tuple[Level, Candidates]:
    """The root, of score 0 and without a scratch slot, and room for candidates, the last `chain` of them a chain's."""
    zero, n = torch.zeros(1, dtype=torch.int64, device=device), k + (max_depth - 1) * k * k
    tokens, parents = torch.arange(-1, n + chain - 1, device=device).repeat(2, 1)  # the parent is the one before
    parents[n:n + 2] = -1
    scores = torch.full((n + chain,), -torch.inf, device=device)
    return Level(zero, zero.float(), zero - 1, zero, zero.new_zeros(1, 2)), Candidates(tokens, scores, parents)


def grow(logits: Tensor, level: Level, candidates: Candidates, depth: int, k: int, ids: Tensor | None = None,
         noise: Tensor | None = None) -> Level:
    """Give each fed node its k best continuations, add them to `candidates`, and choose the k best to be fed next.
    logits [N, V] of the nodes of `level`, `depth` below the root, of tokens `ids` [V] (None: of all); at depth 0
    `level` is the root, see `start`. noise [all tokens] is added to each node's logits."""
    tokens, scores = (x.flatten() for x in best_children(noisy(logits, ids, noise), level.scores, k))
    tokens = tokens if ids is None else ids[tokens]
    first = k + (depth - 1) * k * k if depth else 0
    here = slice(first, first + len(tokens))
    candidates.tokens[here], candidates.scores[here] = tokens, scores
    candidates.parents[here] = level.index.repeat_interleave(k)
    best = best_first(scores, k)
    slot = torch.arange(depth * k, (depth + 1) * k, device=logits.device)[:, None]
    own = torch.where(slot >> 6 == torch.arange(2, device=slot.device), torch.ones_like(slot) << (slot & 63), 0)
    return Level(tokens[best], scores[best], first + best, best // k, level.bits[best // k] | own)


def rerank(state: State, candidates: Candidates, n: int, max_depth: int) -> Tree:
    """EAGLE-2's last step (arXiv 2406.16858, 4.2): of all N candidates keep the n most probable, as one tree
    under the newest committed token.

    A parent comes before its child and never scores lower, and the sort is stable, so whoever is kept has its
    parent kept too. Ascending order of the kept indices is level order. Returns a Tree of n + 1 nodes.
    """
    tokens, scores, parents = candidates
    kept = best_first(scores, n).sort().values  # [n] candidate indices
    node_of = torch.zeros(len(scores) + 1, dtype=torch.int64, device=scores.device)  # the last entry serves parent -1
    node_of[kept] = torch.arange(1, n + 1, device=scores.device)
    new_parents = node_of[parents[kept]]
    return build(torch.cat((root(state), tokens[kept])), torch.cat((new_parents.new_zeros(1), new_parents)), max_depth)


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


def accept_commit(tree: Tree, next_tokens: Tensor, state: State, stop_ids: Tensor, limit: Tensor, max_depth: int,
                  report: Tensor) -> Tensor:
    """Accept, append what was accepted to the text, cut after the first of `stop_ids` [any] and at the length `limit`
    (0-d). Changes state.tokens, length, committed and done in place; once done is set, nothing that counts.
    Returns accept's path and fills report [max_depth + 3] int64 for the host: how many tokens were committed,
    whether the text has ended, and the tokens (entries beyond that number do not count)."""
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


def compact(kv: Tensor, base: Tensor, path: Tensor, features: Tensor, kept: Tensor) -> None:
    """Move rows base + path[j] of kv [..., S, D] to base + j, and put features[path], those of the accepted path, into
    `kept` [max_depth + 1, C]. base 0-d int64, path [max_depth + 1] int64, features [T, C]."""
    slots = base + torch.arange(len(path), device=path.device)
    kv.index_copy_(-2, slots, kv.index_select(-2, base + path))  # gathered first, for the slots overlap
    kept.copy_(features[path])


def best_tokens(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """The k most probable tokens of each of logits [N, V], best first, [N, k] int64; ids and noise as in `grow`."""
    best = noisy(logits, ids, noise).topk(k).indices
    return best if ids is None else ids[best]


def argmax(logits: Tensor) -> Tensor:
    """The most probable token of each of logits [T, V], [T] int64."""
    return logits.argmax(-1)
