"""One level of a draft tree with DSpark's Markov head "vanilla", which adds W2 W1[parent token] to the logits.

The kernel that multiplies also finds the best tokens of its block of the vocabulary. With ops/topk.py's merge and
ops/tree.py's choice of the next level, a level is three launches. With separate steps it would be six.

Letters: V tokens of the vocabulary, or of the part of it that a draft head knows; r the head's rank.
"""
import torch
from torch import Tensor

import tree
from ops.device import by_device, pdl_options, start_next, tl, triton, wait_for_previous
from ops.linear import linear
from ops.topk import best_in_lanes, key_of, merge_lists, sort_bits
from ops.tree import next_level
from tree import Candidates, Level

PROGRAMS = 256  # up to so many blocks of 128 tokens; if V needs more, blocks of 256: half the keys to merge, as fast
TILE = 32768  # bytes of W2 that a program loads at once: they fit its registers


@triton.jit(do_not_specialize=["N"])
def markov_kernel(before, w1, w2, logits, noise, ids, keys, peaks, sums, N, V, RANK: tl.constexpr, K: tl.constexpr,
                  BLOCK: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """topk.best_of_block_kernel of logits + W2 W1[before] + noise. Grid (blocks of V): a program does BLOCK tokens for
    all N <= 16 rows; a warp has one row or two.

    Pointers: before [N] int64, w1 [all tokens, RANK], w2 [V, RANK], logits [V] fp32, noise [all tokens] fp32 and ids
    [V] int64 (or None), keys [N, blocks, K] int64, peaks and sums [N, blocks] fp32. BK columns of the weights are
    multiplied at once.
    """
    block, row = tl.program_id(0), tl.arange(0, 16)
    last = tl.minimum(block * BLOCK + tl.arange(0, BLOCK), V - 1)  # a ragged block reads the last row again
    token = block * BLOCK + tl.arange(0, BLOCK // 32)[:, None, None] * 32 + tl.arange(0, 32)[None, None, :]
    if noise is not None:
        id_ = token if ids is None else tl.load(ids + token, mask=token < V, other=0)
    k = tl.arange(0, BK)[None, :]
    w_rows = w2 + last.to(tl.int64)[:, None] * RANK
    start_next(PDL)
    # Weights depend on no kernel: their first tile is loaded while the kernel before still runs.
    w = tl.load(w_rows + k, mask=k < RANK, other=0.0)
    wait_for_previous(PDL)
    e_rows = w1 + tl.load(before + row, mask=row < N, other=0)[:, None] * RANK
    shared = tl.load(logits + token, mask=token < V, other=-float("inf"))
    if noise is not None:
        own = tl.load(noise + id_, mask=token < V, other=0.0)
    e = tl.load(e_rows + k, mask=k < RANK, other=0.0)
    acc = tl.dot(e, w.trans(), input_precision="ieee")
    for first in tl.range(BK, RANK, BK, num_stages=2):
        w = tl.load(w_rows + first + k, mask=first + k < RANK, other=0.0)
        e = tl.load(e_rows + first + k, mask=first + k < RANK, other=0.0)
        acc = tl.dot(e, w.trans(), acc, input_precision="ieee")
    # A gather, because it leaves the layout of the tensor cores' sums: for that one, every round would be a barrier.
    i = tl.arange(0, 16 * BLOCK)
    x = tl.gather(tl.reshape(acc, [16 * BLOCK]), i // 32 % 16 * BLOCK + i // 512 * 32 + i % 32, 0)
    x = tl.reshape(x, [BLOCK // 32, 16, 32]) + shared
    if noise is not None:
        x += own
    at = row * tl.num_programs(0) + block
    peak = tl.max(tl.max(x, 0), 1)
    share = tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)[None, :, None])
    tl.store(peaks + at, peak, mask=row < N)
    tl.store(sums + at, tl.sum(tl.sum(share, 0), 1), mask=row < N)
    best, best_token = best_in_lanes(tl.where(token < V, sort_bits(x), -(1 << 31)), token, K)
    rank = tl.arange(0, 32)[None, :]
    tl.store(keys + at[:, None] * K + rank, key_of(best, best_token), mask=(row < N)[:, None] & (rank < K))


def markov_lists(tokens: Tensor, logits: Tensor, w1: Tensor, w2: Tensor, k: int, ids: Tensor | None,
                 noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """For the children of `tokens` [N] int64: keys [N, blocks, k] int64, peaks and sums [N, blocks] fp32, as
    `markov_kernel` describes them."""
    nodes, (vocab, rank) = len(tokens), w2.shape
    block, warps = (128, 8) if vocab <= 128 * PROGRAMS else (256, 16)
    columns = min(TILE // (block * w2.element_size()), max(16, triton.next_power_of_2(rank)))
    blocks = triton.cdiv(vocab, block)
    keys = tokens.new_empty(nodes, blocks, k)
    peaks, sums = logits.new_empty(2, nodes, blocks)
    markov_kernel[blocks,](tokens, w1, w2, logits, noise, None if noise is None else ids, keys, peaks, sums, nodes,
                           vocab, rank, k, block, columns, num_warps=warps, **pdl_options(logits.device))
    return keys, peaks, sums


def grow_markov_triton(logits: Tensor, w1: Tensor, w2: Tensor, level: Level, candidates: Candidates, depth: int, k: int,
                       ids: Tensor | None = None, noise: Tensor | None = None) -> Level:
    """`grow_markov` by kernels, for at most 16 nodes and k <= 10."""
    lists = markov_lists(level.tokens, logits, w1, w2, k, ids, noise)
    return next_level(*merge_lists(*lists, ids), level, candidates, depth)


def grow_markov_torch(logits: Tensor, w1: Tensor, w2: Tensor, level: Level, candidates: Candidates, depth: int, k: int,
                      ids: Tensor | None = None, noise: Tensor | None = None) -> Level:
    """tree.grow of logits [1, V] fp32, to which a Markov head adds w2 [V, r] @ w1[token] below each node of `level`.
    w1 [all tokens, r]."""
    added = linear(w1[level.tokens], w2, dtype=torch.promote_types(w1.dtype, torch.float32))
    return tree.grow(logits + added, level, candidates, depth, k, ids, noise)


grow_markov = by_device(grow_markov_triton, grow_markov_torch)
