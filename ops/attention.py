"""Triton kernels of a decoding step beside its matrix products: what it starts with, tree attention, RoPE with the
cache write.

A decoding step is one captured CUDA graph: what changes from step to step, the used length of the cache above all,
is read from device memory, and the grids are static. Sums have a fixed order: the same input gives the same bits.
Nothing needs more than the 99 KB of shared memory that a program has on sm_86.
Each kernel has a PyTorch twin that defines it: the public function runs the kernel on CUDA tensors, else the twin.

Shapes as in model.py: T tokens, H query heads, K key/value heads, G = H/K, D head dim, S cache slots, C hidden size.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import device_limits, either, enter, tl, triton


class TreeMask(NamedTuple):
    """Which cache slots each row sees: all before `base`, and slot base + j where bit j % 64 of bits[row, j // 64] is
    set; bits None: where j <= row. `tree_attention` reads it as it is, PyTorch's attention wants it spelled out."""
    base: Tensor  # 0-d int64
    bits: Tensor | None  # [T, 1 or 2] int64

    def dense(self, rows: int, width: int) -> Tensor:
        """Bool [rows, width]."""
        node = torch.arange(width, device=self.base.device) - self.base  # negative in the prefix
        if self.bits is None:
            return node <= torch.arange(rows, device=node.device)[:, None]
        last = 64 * self.bits.shape[1] - 1
        words = self.bits.index_select(1, node.clamp(0, last) >> 6)  # [rows, width]
        return (node < 0) | ((words >> (node & 63) & 1 == 1) & (node <= last))


def tree_mask(base: Tensor, bits: Tensor, width: int) -> Tensor | TreeMask:
    """Which cache slots each row sees: all before `base` (0-d), and slot base + j where bit j % 64 of
    bits[row, j // 64] is set. A TreeMask on a GPU; spelled out as bool [rows, width] for PyTorch on a CPU."""
    mask = TreeMask(base, bits)
    return mask if base.is_cuda else mask.dense(len(bits), width)


def causal_mask(first: Tensor, rows: int, width: int) -> Tensor | TreeMask:
    """Row i is the token in slot first + i (first 0-d) and sees the slots up to its own. As `tree_mask`."""
    mask = TreeMask(first, None)
    return mask if first.is_cuda else mask.dense(rows, width)


def attention_config(T: int, G: int, K: int, D: int, dtype: torch.dtype, sms: int,
                     capability: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(BM rows a tile, BN slots a block, NS splits of the slots, num_warps, num_stages) on `sms` multiprocessors.

    BN and stages are what fits into shared memory and, without a spill, the registers. One program a multiprocessor
    was the fastest on an H100 (BENCHMARKS.md). More than 64 tokens are a prefill, where one split is enough.
    """
    rows = T * G
    if dtype == torch.float32:  # not on the tensor cores
        BM, BN, warps, stages = (16, 32, 8, 2) if rows <= 16 else (32, 16, 8, 2)
    elif rows <= 32:  # 16: the least a tensor core takes
        BM, BN, warps, stages = (16, 64, 4, 3) if rows <= 16 else (32, 64, 4, 2)
    elif T <= 64 and capability >= (9, 0):
        BM, BN, warps, stages = 64, 64, 4, 3
    elif T <= 64:
        BM, BN, warps, stages = (64, 32, 4, 2) if D in (64, 128) else (64, 64, 8, 2)
    else:  # arithmetic dominates: a larger tile uses each block of keys for more rows
        BM, BN, warps, stages = 128, 64, 8, 2
    splits = sms // (K * -(-rows // BM)) if T <= 64 else 1
    return BM, BN, min(max(splits, 1), 8), warps, stages  # the merge reads what every split wrote


@triton.jit
def attend(q, keys, values, slot, live, seen, d, edge, state, D: tl.constexpr):
    """One block of online softmax. state: acc [BM, D], sum [BM], top [BM], the last in units of log 2.

    slot [BN]; live [BN] and edge [D] (is it inside the cache and the head?); seen [BM, BN].
    """
    scale: tl.constexpr = 1.4426950408889634 * D**-0.5  # log2(e) / sqrt(D)
    acc, total, top = state
    mask = edge[None, :] if live is None else live[:, None] & edge[None, :]
    k = tl.load(keys + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
    v = tl.load(values + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BM, BN]
    s = s if seen is None else tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p, shrink = tl.exp2(s * scale - new_top[:, None]), tl.exp2(top - new_top)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def merge_kernel(parts, logs, out, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
                 NS: tl.constexpr, PDL: tl.constexpr):
    """BM rows of out: the mean of their NS parts, weighted by their softmax sums (`logs`), in the order of splits."""
    enter(PDL)
    row, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, DP)
    valid, mask = row < ROWS, (row < ROWS)[:, None] & (d < D)[None, :]
    top = tl.full(row.shape, float("-inf"), tl.float32)
    acc, total = tl.zeros(mask.shape, tl.float32), tl.zeros(row.shape, tl.float32)
    for i in tl.static_range(NS):
        top = tl.maximum(top, tl.load(logs + row * NS + i, mask=valid, other=0.0))
    for i in tl.static_range(NS):
        at = row * NS + i
        weight = tl.exp2(tl.load(logs + at, mask=valid, other=0.0) - top)
        wrote = mask & (weight > 0)[:, None]  # a split without slots wrote no part
        part = tl.load(parts + at[:, None] * D + d[None, :], mask=wrote, other=0.0)
        acc, total = acc + weight[:, None] * part, total + weight
    tl.store(out + row[:, None] * D + d[None, :], acc / total[:, None], mask=mask)


@triton.jit
def attention_kernel(q, kv, base, bits, out, parts, logs, S, T: tl.constexpr, H: tl.constexpr,
                     K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, WORDS: tl.constexpr, BM: tl.constexpr,
                     BN: tl.constexpr, NS: tl.constexpr, PDL: tl.constexpr):
    """Program (tile, head, split): BM of the T * G rows that share a key/value head, a 1/NS of the slots they see."""
    enter(PDL)
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // K
    d, packed = tl.arange(0, DP), tile * BM + tl.arange(0, BM)
    token, valid = packed // G, packed < T * G
    row = token * H + head * G + packed % G  # of q and out as [T * H, D]
    edge = d < D if D < DP else tl.full((DP,), 1, tl.int1)  # all ones: the compiler drops the mask
    q_rows = tl.load(q + row[:, None] * D + d[None, :], mask=valid[:, None] & edge[None, :], other=0.0)
    n = tl.load(base).to(tl.int32)
    if WORDS > 0:
        low = tl.load(bits + token * WORDS, mask=valid, other=0)
        if WORDS == 2:
            high = tl.load(bits + token * WORDS + 1, mask=valid, other=0)
        common, end = n, tl.minimum(n + 64 * WORDS, S)  # every row sees the slots below `common`, none those from `end`
    else:
        common, end = n + tile * BM // G + 1, tl.minimum(n + min(tile * BM + BM - 1, T * G - 1) // G + 1, S)
    blocks = tl.cdiv(end, BN)
    first, stop = split * blocks // NS, (split + 1) * blocks // NS
    masked = tl.minimum(tl.maximum(common // BN, first), stop)

    top = tl.full((BM,), -1e30, tl.float32)  # finite: exp2(-inf - top) is 0 while nothing is seen, not NaN
    state = tl.zeros((BM, DP), tl.float32), tl.zeros((BM,), tl.float32), top
    keys, values = kv + head.to(tl.int64) * S * D, kv + (head + K).to(tl.int64) * S * D
    for block in range(first, masked):
        slot = block * BN + tl.arange(0, BN)
        state = attend(q_rows, keys, values, slot, None, None, d, edge, state, D)
    for block in range(masked, stop):
        slot = block * BN + tl.arange(0, BN)
        node, live = (slot - n)[None, :], slot < end
        if WORDS > 0:
            word = tl.where(node < 64, low[:, None], high[:, None]) if WORDS == 2 else low[:, None]
            seen = (node < 0) | (((word >> (node & 63)) & 1 == 1) & live[None, :])
        else:
            seen = node <= token[:, None]
        state = attend(q_rows, keys, values, slot, live, seen, d, edge, state, D)
    acc, total, top = state
    acc = acc / total[:, None]  # NaN where this split saw nothing: its weight is 0, and the merge leaves it out

    mask = valid[:, None] & edge[None, :]
    if NS == 1:
        tl.store(out + row[:, None] * D + d[None, :], acc, mask=mask)
    else:
        at = row * NS + split
        tl.store(logs + at, top + tl.log2(total), mask=valid)  # -inf where this split saw nothing
        tl.store(parts + at[:, None] * D + d[None, :], acc, mask=mask & (first < stop))


def tree_attention_triton(q: Tensor, kv: Tensor, base: Tensor, bits: Tensor | None = None,
                          config: tuple[int, int, int, int, int] | None = None) -> Tensor:
    (T, H, D), (K, S), (sms, capability) = q.shape, kv.shape[1:3], device_limits(q.device)
    assert q.is_contiguous() and kv.is_contiguous() and (bits is None or bits.is_contiguous())
    BM, BN, NS, warps, stages = config or attention_config(T, H // K, K, D, q.dtype, sms, capability)
    DP, parts, logs, out, pdl = triton.next_power_of_2(D), None, None, q.new_empty(T, H * D), capability >= (9, 0)
    if NS > 1:
        parts, logs = (torch.empty(T * H * NS, n, dtype=torch.float32, device=q.device) for n in (D, 1))
    attention_kernel[(triton.cdiv(T * H // K, BM), K, NS)](
        q, kv, base, bits, out, parts, logs, S, T, H, K, D, DP, 0 if bits is None else bits.shape[1], BM, BN, NS, pdl,
        num_warps=warps, num_stages=stages, launch_pdl=pdl)
    if NS > 1:
        merge_kernel[(triton.cdiv(T * H, 2),)](parts, logs, out, T * H, D, DP, 2, NS, pdl, num_warps=1, launch_pdl=pdl)
    return out


def tree_attention_torch(q: Tensor, kv: Tensor, base: Tensor, bits: Tensor | None = None) -> Tensor:
    """Attention over one layer's static cache -> [T, H * D].

    q [T, H, D] rotated; kv [2, K, S, D] keys and values, those of the T tokens among them, unused slots finite; base
    0-d int64. Row i sees every slot below base, and base + j where bit j % 64 of bits[i, j // 64] is set (bits
    [T, 1 or 2] int64; None: where j <= i). Each row sees at least one.
    """
    (T, H, D), (K, S) = q.shape, kv.shape[1:3]
    width = min(S, int(base) + (T if bits is None else 64 * bits.shape[1]))  # a CPU may ask for the used length
    mask = TreeMask(base, bits).dense(T, width)
    q = q.transpose(0, 1).reshape(1, K, -1, D)  # the rows that share a key are one matrix: no key is ever repeated
    y = F.scaled_dot_product_attention(q, *kv[:, None, :, :width], attn_mask=mask.repeat(H // K, 1))
    return y.reshape(H, T, D).transpose(0, 1).reshape(T, H * D)


tree_attention = either(tree_attention_triton, tree_attention_torch)
