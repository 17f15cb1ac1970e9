"""The most probable tokens of each row of logits, in two Triton kernels: best of each block, then best of all blocks.

The choice is made among int64 keys, each made of a value and an index: the largest key is the best value, at a tie the
lower index. tree.best_children, tree.best_tokens and tree.argmax are the PyTorch twins.

Where a warp has whole rows (ops/markov.py, and `merge_lists` of its blocks), values are compared as int32 instead. A
GPU finds the largest int32 of a warp in one instruction, and no warp waits for another. Such tiles are [any, rows,
lanes].

Letters: V tokens of the vocabulary, or of the part of it that a draft head knows.
"""
import torch
from torch import Tensor

from ops.device import pdl_options, tl, triton, wait_for_previous


@triton.jit
def sort_bits(value):
    """int32 that sort like the values (fp32). No number becomes -(1 << 31)."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 ties with 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats are sign and magnitude, integers two's complement


@triton.jit
def bits_value(bits):
    """The fp32 value that `sort_bits` was given."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(bits, index):
    """int64 keys that sort like `bits` of sort_bits, and at a tie the lower index first."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def sort_key(value, index, real):
    """int64 keys that sort like the values (fp32), and at a tie the lower index first. Where not `real`: the smallest
    key."""
    return tl.where(real, key_of(sort_bits(value), index), -(1 << 63))


@triton.jit
def key_value(key):
    """The fp32 value that a key was made of."""
    return bits_value((key >> 32).to(tl.int32))


@triton.jit
def key_index(key):
    """The index that a key was made of."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def best_of_block_kernel(logits, noise, ids, keys, peaks, sums, V, stride, NOISE_STRIDE: tl.constexpr, K: tl.constexpr,
                         BLOCK: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr):
    """The K best tokens of each block of a row and, with SUM, the block's share of the row's log-sum-exp.

    Grid (rows, blocks of V): a program does BLOCK tokens of one row.
    Pointers: logits [rows, V] with rows `stride` apart, noise [any, all tokens] fp32 (or None) with rows NOISE_STRIDE
    apart (0: one for all rows), ids [V] int64 (or None), keys [rows, blocks, K] int64, peaks and sums [rows, blocks]
    fp32: each block's maximum and its sum of exp(x - peak).
    """
    wait_for_previous(PDL)
    row, block = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + block
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + token, mask=token < V, other=-float("inf")).to(tl.float32)
    if noise is not None:
        id_ = token if ids is None else tl.load(ids + token, mask=token < V, other=0)
        x += tl.load(noise + row * NOISE_STRIDE + id_, mask=token < V, other=0.0)
    if SUM:
        peak = tl.max(x, 0)
        tl.store(peaks + at, peak)
        tl.store(sums + at, tl.sum(tl.exp(x - tl.where(peak == -float("inf"), 0.0, peak)), 0))
    key = sort_key(x, token, token < V)
    for rank in range(K):
        best = tl.max(key, 0)
        tl.store(keys + at * K + rank, best)
        key = tl.where(key == best, -(1 << 63), key)


@triton.jit
def merge_blocks_kernel(keys, peaks, sums, ids, tokens, logs, BLOCKS, K: tl.constexpr, SIZE: tl.constexpr,
                        B: tl.constexpr, SUM: tl.constexpr, PDL: tl.constexpr):
    """The K best tokens of a row from those of its blocks, best first, and with SUM their log-probabilities: at most 0,
    so that no child scores above its parent.

    Grid (rows): a program does one row. It loads all keys at once, and all of `ids` at once: loads that wait for one
    another take longer than the comparisons. Pointers: keys, peaks, sums, ids as in `best_of_block_kernel`, tokens
    [rows, K] int64, logs [rows, K] fp32. SIZE and B are BLOCKS * K and BLOCKS rounded up to a power of two.
    """
    wait_for_previous(PDL)
    row, i, block = tl.program_id(0), tl.arange(0, SIZE), tl.arange(0, B)
    key = tl.load(keys + row * BLOCKS * K + i, mask=i < BLOCKS * K, other=-(1 << 63))
    if SUM:
        peak = tl.load(peaks + row * BLOCKS + block, mask=block < BLOCKS, other=-float("inf"))
        top = tl.max(peak, 0)
        total = tl.sum(tl.load(sums + row * BLOCKS + block, mask=block < BLOCKS, other=0.0) * tl.exp(peak - top), 0)
    lane = tl.arange(0, 16)
    kept = tl.full([16], -(1 << 63), tl.int64)
    for rank in range(K):
        best = tl.max(key, 0)
        kept = tl.where(lane == rank, best, kept)
        key = tl.where(key == best, -(1 << 63), key)
    token, real = key_index(kept), lane < K
    if ids is not None:
        token = tl.load(ids + token, mask=real, other=0)
    tl.store(tokens + row * K + lane, token, mask=real)
    if SUM:  # a GPU's logarithm of a number just above 1 may be negative: then the result would be above 0
        tl.store(logs + row * K + lane, tl.minimum(key_value(kept) - top - tl.log(total), 0.0), mask=real)


@triton.jit
def take_best(bits, index):
    """The largest of bits [any, rows, lanes] in each row, the lowest index that has it, and `bits` without it."""
    best = tl.max(tl.max(bits, 0), 1)
    first = tl.min(tl.min(tl.where(bits == best[None, :, None], index, 0x7FFFFFFF), 0), 1)
    return best, first, tl.where(index == first[None, :, None], -(1 << 31), bits)


@triton.jit
def best_in_lanes(bits, index, K: tl.constexpr):
    """The K largest of bits [any, rows, lanes] in each row, at a tie the lower index first, and their indices: int32
    [rows, 32], best first, in the first K lanes."""
    ROWS: tl.constexpr = bits.shape[1]
    lane = tl.arange(0, 32)[None, :]
    best, best_index = tl.zeros([ROWS, 32], tl.int32), tl.zeros([ROWS, 32], tl.int32)
    for rank in range(K):
        largest, first, bits = take_best(bits, index)
        best = tl.where(lane == rank, largest[:, None], best)
        best_index = tl.where(lane == rank, first[:, None], best_index)
    return best, best_index


@triton.jit
def merge_lists_kernel(keys, peaks, sums, ids, tokens, logs, BLOCKS, K: tl.constexpr, SIZE: tl.constexpr,
                       PDL: tl.constexpr):
    """What `merge_blocks_kernel` does, for hundreds of blocks: only the K with the highest peaks have keys that count.

    Grid (rows): a program, which is one warp, does one row. Pointers as there. SIZE is BLOCKS rounded up to a power of
    two, at least 128: as many as a warp loads at once.
    """
    wait_for_previous(PDL)
    row, block = tl.program_id(0), tl.arange(0, SIZE)[None, None, :]
    at, real = row * BLOCKS + block, block < BLOCKS
    peak = tl.load(peaks + at, mask=real, other=-float("inf"))
    top = tl.max(peak)
    total = tl.sum(tl.load(sums + at, mask=real, other=0.0) * tl.exp(peak - top))

    pair = tl.arange(0, 128)[None, None, :]  # of the K blocks, best first, and the K ranks of their keys
    number, rank = pair // K, pair % K
    bits, of_pair = tl.where(real, sort_bits(peak), -(1 << 31)), tl.zeros([1, 1, 128], tl.int32)
    for i in range(K):
        _, highest, bits = take_best(bits, block)
        of_pair = tl.where(number == i, highest[None, :, None], of_pair)
    real = (number + rank < K) & (number < BLOCKS)  # before any further key there are K better ones
    key = tl.load(keys + (row * BLOCKS + of_pair) * K + rank, mask=real, other=-(1 << 63))
    best, token = best_in_lanes((key >> 32).to(tl.int32), key_index(key).to(tl.int32), K)

    lane = tl.arange(0, 32)[None, :]
    if ids is not None:
        token = tl.load(ids + token, mask=lane < K, other=0)
    tl.store(tokens + row * K + lane, token, mask=lane < K)
    tl.store(logs + row * K + lane, tl.minimum(bits_value(best) - top - tl.log(total), 0.0), mask=lane < K)


def merge_lists(keys: Tensor, peaks: Tensor, sums: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """`top_children` from keys [rows, blocks, k] int64, peaks and sums [rows, blocks] fp32 of the blocks."""
    rows, blocks, k = keys.shape
    tokens, logs = keys.new_empty(rows, k), peaks.new_empty(rows, k)
    size = max(128, triton.next_power_of_2(blocks))
    merge_lists_kernel[rows,](keys, peaks, sums, ids, tokens, logs, blocks, k, size, num_warps=1,
                              **pdl_options(keys.device))
    return tokens, logs


def top_children(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None, log_p: bool = True
                 ) -> tuple[Tensor, Tensor]:
    """The k <= 10 most probable tokens of each row of logits [rows, V], best first, the lower id at a tie: tokens
    [rows, k] int64, and their log-probabilities [rows, k] fp32, at most 0 (without `log_p` not computed). ids: see
    tree.grow. noise [all tokens] fp32 is added to every row, or row r of noise [>= rows, all tokens] to row r.

    A row is cut into at most 64 blocks: enough programs for a large GPU even if there is one row.
    """
    rows, vocab = logits.shape
    device = logits.device
    block = max(1024, triton.next_power_of_2(triton.cdiv(vocab, 64)))  # 2048 for Llama-3
    blocks = triton.cdiv(vocab, block)
    keys = torch.empty(rows, blocks, k, dtype=torch.int64, device=device)
    peaks, sums = torch.empty(2, rows if log_p else 0, blocks, device=device)
    tokens = keys.new_empty(rows, k)
    logs = peaks.new_empty(rows, k)
    noise_stride = noise.stride(0) if noise is not None and noise.dim() == 2 else 0
    best_of_block_kernel[rows, blocks](logits, noise, None if noise is None else ids, keys, peaks, sums, vocab,
                                       logits.stride(0), noise_stride, k, block, log_p,
                                       num_warps=4 if block == 1024 else 2, **pdl_options(device))
    size = triton.next_power_of_2(blocks * k)
    merge_blocks_kernel[rows,](keys, peaks, sums, ids, tokens, logs, blocks, k, size, triton.next_power_of_2(blocks),
                               log_p, num_warps=max(1, size // 256), **pdl_options(device))
    return tokens, logs


def best_tokens(logits: Tensor, k: int, ids: Tensor | None = None, noise: Tensor | None = None) -> Tensor:
    """tree.best_tokens; at a tie the lower id."""
    return top_children(logits, k, ids, noise, log_p=False)[0]


def argmax(logits: Tensor) -> Tensor:
    """tree.argmax; at a tie the lower id."""
    return best_tokens(logits, 1).flatten()
