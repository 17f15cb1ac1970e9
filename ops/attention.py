"""Tree attention: the rows of a tree against one layer's static cache, each row with a mask of its own.

A decoding step is one captured CUDA graph, so grids are static, and what changes from step to step (above all the used
length of the cache) is read from device memory. Sums have a fixed order: the same input gives the same bits. A
program needs at most 99 KB of shared memory on Ampere and Ada, and up to 224 KB on Hopper.

Every kernel in ops/ has a twin in plain PyTorch, which says what the kernel computes. The tests hold the two together,
and the public function picks one by the device of its first argument. On a CPU the twin runs or, for a few functions, a
kernel in C++ (ops/cpu_kernels.py).

Shapes as in model.py: T tokens, H query heads, K key/value heads, G = H / K, D head dim, S cache slots.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import cpu_kernels
from ops.device import by_device, device_limits, pdl_options, start_next, tl, triton, wait_for_previous


class TreeMask(NamedTuple):
    """Which cache slots each row sees: every slot below `base`, and slot base + j if bit j % 64 of bits[row, j // 64]
    is set. Without bits: slot base + j if j <= row. `tree_attention` reads this form, PyTorch's attention needs
    `dense`.

    With a sliding window, row i, which lies in slot base + i, sees of the slots below `base` only those above
    base + i - window: `window` of them, its own counted.

    settled: `base` and all slots below it were written before the CUDA graph of this cycle began, or by PyTorch's
    kernels in it. So they may be read while the kernel before this one still runs."""
    base: Tensor  # 0-d int64
    bits: Tensor | None  # [T, 1 or 2] int64
    window: int | None = None
    settled: bool = False

    def dense(self, rows: int, width: int) -> Tensor:
        """The mask as bool [rows, width], true where a row sees a slot."""
        node = torch.arange(width, device=self.base.device) - self.base  # negative in the prefix
        row = torch.arange(rows, device=node.device)[:, None]
        if self.bits is None:
            seen = node <= row
        else:
            last = 64 * self.bits.shape[1] - 1
            words = self.bits.index_select(1, node.clamp(0, last) >> 6)  # [rows, width]
            seen = (node < 0) | ((words >> (node & 63) & 1 == 1) & (node <= last))
        return seen if self.window is None else seen & ((node >= 0) | (node > row - self.window))


def tree_mask(base: Tensor, bits: Tensor, width: int, window: int | None = None, settled: bool = False
              ) -> Tensor | TreeMask:
    """TreeMask(base, bits, window, settled): in that form, or for a CPU without compiled kernels as bool [rows, width].

    base 0-d int64, bits [rows, 1 or 2] int64."""
    mask = TreeMask(base, bits, window, settled)
    return mask if base.is_cuda or cpu_kernels.library() else mask.dense(len(bits), width)


def causal_mask(first: Tensor, rows: int, width: int) -> Tensor | TreeMask:
    """The mask of `rows` tokens in slots first, first + 1, ...: each sees the slots up to its own. first 0-d int64.
    Returned in the same form as by `tree_mask`."""
    mask = TreeMask(first, None)
    return mask if first.is_cuda or cpu_kernels.library() else mask.dense(rows, width)


def attention_config(T: int, G: int, K: int, D: int, dtype: torch.dtype, sms: int,
                     capability: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """How to cut the work on `sms` multiprocessors: (BM rows of a tile, BN slots of a block, NS splits of the slots,
    num_warps, num_stages).

    BN and num_stages are as large as shared memory, and registers without spilling, allow. One program per
    multiprocessor was fastest on an H100 (docs/experiments.md). More than 128 tokens are a prefill, for which one split
    is enough.
    """
    rows = T * G
    hopper = capability >= (9, 0)
    small = rows <= 16 or hopper and rows <= 64 and 8 * K * -(-rows // 16) <= sms
    if dtype == torch.float32:  # not on the tensor cores
        BM, BN, warps, stages = (16, 32, 8, 2) if rows <= 16 else (32, 16, 8, 2)
    elif small or rows <= 32:  # 16 is the smallest tile of the tensor cores
        BM, BN, warps, stages = (16, 64, 4, 3) if small else (32, 64, 4, 2)
    elif T <= 64 and hopper:
        BM, BN, warps, stages = 64, 64, 4, 3
    elif T <= 64:
        BM, BN, warps, stages = (64, 32, 4, 2) if D in (64, 128) else (64, 64, 8, 2)
    else:  # arithmetic dominates: a larger tile uses each block of keys for more rows
        BM, BN, warps, stages = 128, 64, 8, 2
    if D > 128 and dtype != torch.float32:  # wide heads: less shared memory, and registers of more warps
        if not hopper:
            BM, BN, stages = min(BM, 64), 64 if BM <= 32 else 32, 2
        elif BM == 64:
            warps, stages = 8, 2
    splits = sms // (K * -(-rows // BM)) if T <= 128 else 1
    most = 8  # since merging reads what every split wrote
    # Few heads: many splits of a block or two, with one stage. They need less shared memory, so programs of the next
    # kernels fit beside them and fetch their weights. With BM = 64 and 16 splits or fewer, a split of a long context
    # has many blocks, so the stages are kept.
    if hopper and splits >= 8 and BN == 64:
        if BM == 16:
            most, stages = 16, 1
        elif BM == 64:
            most, stages = 12, 1 if splits > 16 else stages
    return BM, BN, min(max(splits, 1), most), warps, stages


@triton.jit
def attend(q, k, v, seen, state, D: tl.constexpr):
    """One block of online softmax: add the keys and values k, v [BN, DP] to `state`, and return it.

    q [BM, DP]; seen [BM, BN] (None: all). state: the weighted sum of values [BM, DP], the sum of weights [BM], and the
    largest score [BM] in units of log 2.
    """
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5  # log2(e) / sqrt(D)
    acc, total, top = state
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    s = s if seen is None else tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def load_slots(keys, values, slot, in_cache, d, in_head, k, v, D: tl.constexpr):
    """The keys and values [BN, DP] of the slots `slot` [BN] of one head, of keys, values -> [S, D]. in_cache [BN]
    (None: all), in_head [DP]: what is loaded; k, v: what the others are (numbers, or [BN, DP])."""
    mask = in_head[None, :] if in_cache is None else in_cache[:, None] & in_head[None, :]
    at = slot[:, None] * D + d[None, :]
    return tl.load(keys + at, mask=mask, other=k), tl.load(values + at, mask=mask, other=v)


@triton.jit
def blocks_of_split(n, tile, split, S, T: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, NS: tl.constexpr):
    """Which blocks of BN slots a program of attention_kernel reads: (common, end, first, stop). Every row of the tile
    sees all slots below `common`, and no row sees a slot from `end` on. Its blocks are `first` to stop - 1."""
    if WORDS > 0:
        common, end = n, tl.minimum(n + 64 * WORDS, S)
    else:
        common, end = n + tile * BM // G + 1, tl.minimum(n + min(tile * BM + BM - 1, T * G - 1) // G + 1, S)
    start = 0  # the first block that a row of the tile sees
    if WINDOW > 0:  # then every block needs a mask: the first slots are seen by the first rows alone
        start, common = tl.maximum(tl.minimum(n + tile * BM // G - WINDOW + 1, n), 0) // BN, 0
    blocks = tl.cdiv(end, BN) - start
    return common, end, start + split * blocks // NS, start + (split + 1) * blocks // NS


@triton.jit
def seen_slots(slot, end, n, token, low, high, WORDS: tl.constexpr, WINDOW: tl.constexpr):
    """Which of the slots `slot` [BN] the rows of the tokens `token` [BM] see, bool [BM, BN]: see TreeMask."""
    node = (slot - n)[None, :]
    if WORDS > 0:
        word = tl.where(node < 64, low[:, None], high[:, None]) if WORDS == 2 else low[:, None]
        seen = (node < 0) | (((word >> (node & 63)) & 1 == 1) & (slot < end)[None, :])
    else:
        seen = node <= token[:, None]
    return seen & ((node >= 0) | (node > token[:, None] - WINDOW)) if WINDOW > 0 else seen


@triton.jit
def attention_kernel(q, kv, base, bits, out, parts, logs, S, T: tl.constexpr, H: tl.constexpr,
                     K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, WINDOW: tl.constexpr,
                     EARLY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NS: tl.constexpr, PDL: tl.constexpr):
    """Tree attention, or with NS > 1 the parts of it that `merge_splits_kernel` adds up.

    Grid (tiles of T * G rows, K, NS): a program takes BM of the T * G rows that share a key/value head, and one of NS
    parts of the slots that they see. DP is D rounded up to a power of two. WINDOW: see TreeMask; 0: none. EARLY: what
    the mask says is settled of the first block is loaded before the wait for the previous kernel.
    Pointers: q [T, H, D], kv [2, K, S, D], base int64, bits [T, WORDS] int64 (None: causal), out [T, H, D];
    parts [T * H, NS, D] fp32, the attention over each split, and logs [T * H, NS] fp32, log2 of its sum of weights.
    """
    if EARLY:
        start_next(PDL)
    else:
        wait_for_previous(PDL)
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // K
    d = tl.arange(0, DP)
    packed = tile * BM + tl.arange(0, BM)  # of the rows that share this head: token * G + head in its group
    token, valid = packed // G, packed < T * G
    row = token * H + head * G + packed % G  # of q and out as [T * H, D]
    in_head = d < D if D < DP else tl.full((DP,), 1, tl.int1)  # all ones: the compiler drops the mask
    n = tl.load(base).to(tl.int32)
    common, end, first, stop = blocks_of_split(n, tile, split, S, T, G, WORDS, WINDOW, BM, BN, NS)
    sees_any = first < stop
    keys, values = kv + head.to(tl.int64) * S * D, kv + (head + K).to(tl.int64) * S * D
    if EARLY:
        slot = first * BN + tl.arange(0, BN)
        k, v = load_slots(keys, values, slot, (slot < n) & sees_any, d, in_head, 0.0, 0.0, D)
        wait_for_previous(PDL)
    q_rows = tl.load(q + row[:, None] * D + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
    low = tl.load(bits + token * WORDS, mask=valid, other=0) if WORDS > 0 else token
    high = tl.load(bits + token * WORDS + 1, mask=valid, other=0) if WORDS == 2 else token

    top = tl.full((BM,), -1e30, tl.float32)  # finite: exp2(-inf - top) is 0 while nothing is seen, not NaN
    state = tl.zeros((BM, DP), tl.float32), tl.zeros((BM,), tl.float32), top
    if EARLY:
        k, v = load_slots(keys, values, slot, (slot >= n) & (slot < end) & sees_any, d, in_head, k, v, D)
        seen = seen_slots(slot, end, n, token, low, high, WORDS, WINDOW) & sees_any
        state = attend(q_rows, k, v, seen, state, D)
        first += 1
    masked = tl.minimum(tl.maximum(common // BN, first), stop)  # the first block that needs a mask
    for block in range(first, masked):
        slot = block * BN + tl.arange(0, BN)
        k, v = load_slots(keys, values, slot, None, d, in_head, 0.0, 0.0, D)
        state = attend(q_rows, k, v, None, state, D)
    for block in range(masked, stop):
        slot = block * BN + tl.arange(0, BN)
        k, v = load_slots(keys, values, slot, slot < end, d, in_head, 0.0, 0.0, D)
        state = attend(q_rows, k, v, seen_slots(slot, end, n, token, low, high, WORDS, WINDOW), state, D)
    acc, total, top = state
    acc = acc / total[:, None]  # NaN where this split saw nothing: its weight is 0, and the merge leaves it out

    mask = valid[:, None] & in_head[None, :]
    if NS == 1:
        tl.store(out + row[:, None] * D + d[None, :], acc, mask=mask)
    else:
        at = row * NS + split
        tl.store(logs + at, top + tl.log2(total), mask=valid)  # -inf where this split saw nothing
        tl.store(parts + at[:, None] * D + d[None, :], acc, mask=mask & sees_any)


@triton.jit
def merge_splits_kernel(parts, logs, out, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
                        NS: tl.constexpr, PDL: tl.constexpr):
    """Merge the NS splits of each row: the mean of its parts, weighted by their sums of weights, in a fixed order.

    Grid (tiles of ROWS): a program merges BM rows. Pointers: parts [ROWS, NS, D] and logs [ROWS, NS] as
    `attention_kernel` wrote them, out [ROWS, D]; ROWS = T * H.
    """
    wait_for_previous(PDL)
    row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    valid, mask = row < ROWS, (row < ROWS)[:, None] & (d < D)[None, :]
    top = tl.full(row.shape, float("-inf"), tl.float32)
    acc, total = tl.zeros(mask.shape, tl.float32), tl.zeros(row.shape, tl.float32)
    for i in tl.static_range(NS):
        top = tl.maximum(top, tl.load(logs + row * NS + i, mask=valid, other=0.0))
    for i in tl.static_range(NS):
        at = row * NS + i
        weight = tl.exp2(tl.load(logs + at, mask=valid, other=0.0) - top)
        wrote = mask & (weight > 0)[:, None]  # a row that sees no slot of a split has weight 0, and no part or NaN
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=wrote, other=0.0)
        acc, total = acc + weight[:, None] * part, total + weight
    tl.store(out + row[:, None] * D + d[None, :], acc / total[:, None], mask=mask)


def tree_attention_triton(q: Tensor, kv: Tensor, base: Tensor, bits: Tensor | None = None, window: int | None = None,
                          settled: bool = False, config: tuple[int, int, int, int, int] | None = None,
                          early: bool | None = None) -> Tensor:
    """`tree_attention` by the kernels. config: see attention_config. early: see attention_kernel; None: where it
    was measured to help (docs/experiments.md)."""
    T, H, D = q.shape
    K, S = kv.shape[1:3]
    assert q.is_contiguous() and kv.is_contiguous() and (bits is None or bits.is_contiguous())
    BM, BN, NS, warps, stages = config or attention_config(T, H // K, K, D, q.dtype, *device_limits(q.device))
    DP = triton.next_power_of_2(D)
    words = 0 if bits is None else bits.shape[1]
    out = q.new_empty(T, H * D)
    parts = logs = None
    if NS > 1:
        parts = torch.empty(T * H * NS, D, dtype=torch.float32, device=q.device)
        logs = torch.empty(T * H * NS, 1, dtype=torch.float32, device=q.device)
    pdl = pdl_options(q.device)
    if early is None:  # with many splits, or one row, waiting for the block would keep the next kernels from starting
        early = settled and pdl["PDL"] and T > 1 and NS < 8
    attention_kernel[(triton.cdiv(T * H // K, BM), K, NS)](
        q, kv, base, bits, out, parts, logs, S, T, H, K, D, DP, words, window or 0, early, BM, BN, NS,
        num_warps=warps, num_stages=stages, **pdl)
    if NS > 1:
        merge_splits_kernel[(triton.cdiv(T * H, 2),)](parts, logs, out, T * H, D, DP, 2, NS, num_warps=1, **pdl)
    return out


def tree_attention_torch(q: Tensor, kv: Tensor, base: Tensor, bits: Tensor | None = None, window: int | None = None,
                         settled: bool = False) -> Tensor:
    """Attention over one layer's static cache -> [T, H * D].

    q [T, H, D], rotated; kv [2, K, S, D]: keys and values, those of the T tokens included, unused slots finite; base
    0-d int64; bits [T, 1 or 2] int64 or None. Row i sees every slot below base, and slot base + j if bit j % 64 of
    bits[i, j // 64] is set; without bits, if j <= i. With a window it sees of the slots below base only those
    above base + i - window. Each row must see at least one slot. settled: see TreeMask; the result is the same.
    """
    T, H, D = q.shape
    K, S = kv.shape[1:3]
    width = min(S, int(base) + (T if bits is None else 64 * bits.shape[1]))  # on a CPU the used length may be read
    mask = TreeMask(base, bits, window).dense(T, width)
    q = q.transpose(0, 1).reshape(1, K, -1, D)  # the rows that share a key are one matrix: no key is ever repeated
    y = F.scaled_dot_product_attention(q, *kv[:, None, :, :width], attn_mask=mask.repeat(H // K, 1))
    return y.reshape(H, T, D).transpose(0, 1).reshape(T, H * D)


def tree_attention_cpu(q: Tensor, *args, **options) -> Tensor:
    """`tree_attention` by the kernel of ops/cpu_kernels.py, where it takes q's dtype."""
    return (cpu_kernels.attention if cpu_kernels.takes_attention(q) else tree_attention_torch)(q, *args, **options)


tree_attention = by_device(tree_attention_triton, tree_attention_cpu)
