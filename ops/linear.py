"""A linear layer for 1 to 64 rows that reads its weights at the speed of memory, RMSNorm, SiLU and residual fused in.

At batch 1 a decode step is nothing but reading weights, and a tree of 60 tokens reads them as often as one token
does. So one Triton kernel serves every row count: a program owns BN rows of the weights, streams them once, and
does everything a Llama layer wants around a matrix product in the same pass:

    rms_norm(x) @ w.T  =  rstd[m] * sum_k w[n, k] * (g[k] * x[m, k])     rstd is known when the sum is, so it comes last
    silu(gate) * up                                                       rows of gate and up are interleaved in a tile
    RoPE and the cache write                                              so are the two halves of a head
    ... + bias, ... + residual                                            in fp32, rounded once

Where N is too small to occupy the machine, K is split: each split writes its fp32 partial sums, and whichever arrives
last adds all of them up in a fixed order: the same bits whoever that is. With many rows the norm gets a kernel of its
own: x * g has to pass through registers, and every product would wait for it.

Weights of 8 or 4 bits go through the same kernel, with loops of their own: qlinears.py.

Legend: M rows of x, K inputs, N rows of the weights, width = N or, gated, N / 2 outputs.
"""
import math
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import INTERPRET, device_limits, tl, triton
from ops.embed_rope import rope_store
from ops.quantized import Quantized, integer_config, integer_linear, quantize_triton, stream_int4, stream_int8

MAX_ROWS = 64  # beyond, a matrix product is no longer bound by memory and cuBLAS is the better choice
MAX_TILES = 4096  # counters kept for split K
NORM_ROWS = 16  # up to so many rows the norm is fused


class Tiling(NamedTuple):
    BM: int  # rows of x, padded; 1: multiply and add instead of tensor cores
    BN: int  # rows of the weights a program owns
    BK: int
    SK: int  # programs that share a tile's K, at most 64
    warps: int
    stages: int  # K blocks in flight, through shared memory
    ahead: int = 4  # K blocks prefetched into L2 while the kernel before still runs (Hopper)


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None, norm: tuple[Tensor, float] | None = None,
           residual: Tensor | None = None, gated: bool = False, heads: tuple[Tensor, Tensor, Tensor] | None = None,
           dtype: torch.dtype | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N], norm (weight [K], eps), residual [..., width] -> [..., width].

    gated: the first N / 2 rows of the weights are the gate's, the others up's, and the output is silu(gate) * up.
    heads (rope [2, M, D], cache_pos [M], kv [2, K, S, D]), x [M, K]: the output is queries, keys and values, and goes
    on to kernels.rope_store: rotated queries are returned, [M, H * D], the others are stored in kv.
    dtype of the output, x's by default. fp32 keeps the kernel's sums as they are: bf16 logits near 20 are 0.125 apart.
    """
    rows, K = x.numel() // x.shape[-1], x.shape[-1]
    if not x.is_cuda or rows > MAX_ROWS or K % 16 or x.dtype not in (torch.bfloat16, torch.float16):
        y = linear_torch(x, weight, bias, norm, residual, gated)
        return y.to(dtype or y.dtype) if heads is None else rope_store(y, *heads).flatten(1)
    flat = None if residual is None else residual.reshape(rows, -1)
    return linear_triton(x.reshape(rows, K), weight, bias, norm, flat, gated, heads, dtype).view(*x.shape[:-1], -1)


def linear_torch(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None,
                 norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None,
                 gated: bool = False) -> Tensor:
    """What `linear` computes, in plain PyTorch: each step rounded to x's dtype."""
    if norm is not None:
        x = F.rms_norm(x, x.shape[-1:], *norm)
    y = (integer_linear if isinstance(weight, Quantized) else F.linear)(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def linear_triton(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None,
                  norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None, gated: bool = False,
                  heads: tuple[Tensor, Tensor, Tensor] | None = None, dtype: torch.dtype | None = None,
                  config: Tiling | None = None, pdl: bool = True) -> Tensor:
    """`linear` by the kernel. pdl: on Hopper, start while the kernel before drains."""
    (M, K), N, integers = x.shape, weight.shape[0], isinstance(weight, Quantized)
    data, w_scale, group, planes, _ = weight if integers else (weight, None, 0, 0, False)
    (sms, capability), columns = device_limits(x.device), data.shape[1]  # a column of int4 is two weights
    BM, BN, BK, SK, warps, stages, ahead = config or (
        integer_config(M, N, columns, planes, group, sms, capability) if integers else
        linear_config(M, N, K, sms, capability))
    pdl, width, tiles = pdl and capability >= (9, 0), N // 2 if gated or heads else N, triton.cdiv(N, BN)
    rope, cache_pos, kv = heads or (None, None, None)
    kv_heads, slots, size = kv.shape[1:] if heads else (0, 0, 2)
    assert kv is None or (kv.is_contiguous() and rope.is_contiguous() and not gated)
    assert M <= BM and data.is_contiguous() and (SK == 1 or tiles <= MAX_TILES)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = x.new_empty(M, N - 2 * kv_heads * size if heads else width, dtype=dtype)
    (g, eps), launch, x_scale, sums, groups = norm or (None, 0.0), {"launch_pdl": True} if pdl else {}, None, None, 0
    if integers:
        (x, x_scale, sums), g = quantize_triton(x, weight, norm, pdl), None
    elif g is not None and M > NORM_ROWS:
        x, g = norm_triton(x, g, eps, pdl), None
    if group:  # scale and offset of a group are one word
        w_scale, groups = w_scale.view(torch.int32), max(16, triton.next_power_of_2(len(w_scale)))
    partial = out.new_empty(tiles * SK * (BN + 1) * BM, dtype=torch.float32) if SK > 1 else None
    linear_kernel[(tiles * SK,)](
        x, data, bias, g, eps, residual, out, partial, counters(x.device) if SK > 1 else None, rope, cache_pos, kv,
        x_scale, sums, w_scale, M, width, K, columns, slots, D=size, KV_HEADS=kv_heads, GATED=gated,
        EVEN_K=K % (2 * BK if group else BK) == 0, BM=BM, BN=BN, BK=BK, SK=SK, STAGES=stages, AHEAD=ahead, PDL=pdl,
        PLANES=planes, GROUP=group, GROUPS=groups, INTERPRET=INTERPRET, num_warps=warps, **launch)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm of x [..., K], by the kernel that `linear` has for its own norms."""
    if not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    return norm_triton(x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)


def norm_triton(x: Tensor, weight: Tensor, eps: float, pdl: bool = True) -> Tensor:
    """x [M, K], contiguous."""
    (M, K), pdl, out = x.shape, pdl and device_limits(x.device)[1] >= (9, 0), torch.empty_like(x)
    norm_kernel[(M,)](x, weight, out, eps, K, triton.next_power_of_2(K), pdl, num_warps=8, launch_pdl=pdl)
    return out


def linear_config(M: int, N: int, K: int, sms: int, capability: tuple[int, int]) -> Tiling:
    """How to cut [N, K] weights for M rows of x: enough programs at once, and enough of their weights in flight, that
    memory never idles. Measured on an H100 (BENCHMARKS.md); smaller blocks where shared memory is 99 KB."""
    hopper = capability >= (9, 0)
    if M == 1:  # threads side by side along K, so that the loop needs no barrier
        return (Tiling(1, 4, 2048, 1, 4, 1, ahead=1) if K >= 8192 else
                Tiling(1, 8, 1024, 1, 4, 4, ahead=2) if K >= 2048 else
                Tiling(1, 4, 1024, 1, 4, 1, ahead=1) if N <= 16384 else Tiling(1, 4, 256, 1, 1, 1, ahead=1))
    BM = 16 if M <= 16 else 32 if M <= 32 else 64
    if K < 1024:  # over before memory is busy: all of a tile's K in flight, and nothing shared
        return Tiling(BM, 64, 64 if K % 64 == 0 else 32, 1, 4, 4 if not hopper else 9 if BM == 16 else 6)
    BN, BK, SK, warps, stages, tiles = 64, 128 if BM < 64 else 64, 1, 4, 4, -(-N // 64)
    if tiles < sms:  # two programs a multiprocessor share the work; on Hopper one, with twice as much in flight
        SK = (1 if hopper else 2) * sms // tiles
        BK, stages = (BK, stages) if not hopper else (256, 5) if BM == 16 else (128, 6)
    elif BM == 16 and hopper:
        BK, stages = 256, 3
    elif BM == 64:  # every tile reads all of x again, from L2: large ones, if they make up nearly whole waves
        waves = tiles / 2 / sms
        if not hopper:
            BN, BK = 128, 32
        elif math.ceil(waves) / waves < 1.4:
            BN, BK, warps, stages = 128, 128, 8, 3
    while K % BK and BK > 32:
        BK //= 2  # K = 576: no masks with blocks of 64
    return Tiling(BM, BN, BK, max(1, min(SK, K // BK // 4, 64)), warps, stages)  # a shorter split is all ramp


@cache
def counters(device: torch.device) -> Tensor:
    """One arrival counter a tile, shared by all calls of a stream. Made by the first call: warm up before a capture."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.jit
def norm_kernel(x_ptr, norm_ptr, out_ptr, eps, K: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """RMSNorm of one row."""
    k = tl.arange(0, PADDED)
    g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + tl.program_id(0) * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0) * K + k, x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * g, mask=k < K)


@triton.jit(do_not_specialize=["M"])  # one kernel for all trees that BM has room for
def linear_kernel(x_ptr, w_ptr, bias_ptr, norm_ptr, eps, res_ptr, out_ptr, partial_ptr, count_ptr, rope_ptr,
                  slot_ptr, kv_ptr, x_scale_ptr, sums_ptr, w_scale_ptr, M, width, K,
                  columns, S,
                  D: tl.constexpr, KV_HEADS: tl.constexpr,
                  GATED: tl.constexpr, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                  BK: tl.constexpr, SK: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
                  PDL: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
                  INTERPRET: tl.constexpr):
    tile, split = tl.program_id(0) // SK, tl.program_id(0) % SK
    ROPE: tl.constexpr = rope_ptr is not None
    HALVES: tl.constexpr = 2 if GATED or ROPE else 1
    r = tl.arange(0, BN)
    col = tl.minimum(tile * (BN // HALVES) + r // HALVES, width - 1)  # a ragged last tile reads its last row again
    if ROPE:  # even rows of the tile are a head's first half, odd ones what RoPE pairs them with
        row = col // (D // 2) * D + col % (D // 2) + r % 2 * (D // 2)
    else:  # gated: even rows are gate's, odd ones up's
        row = col + r % HALVES * width
    w_rows = w_ptr + row.to(tl.int64)[:, None] * columns
    blocks = tl.cdiv(columns, BK)
    first, last = split * blocks // SK * BK, (split + 1) * blocks // SK * BK
    if PDL:  # weights depend on no kernel, everything else does
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD:
            prefetch(w_rows, first, columns, AHEAD * BK, 128 if PLANES else 64)
        tl.extra.cuda.gdc_wait()
    if GROUP:
        acc, squares = stream_int4(x_ptr, sums_ptr, w_rows, row, w_scale_ptr, M, width * HALVES, K, columns,
                                   first, last, EVEN_K, GROUP, GROUPS, PLANES, BM, BN, BK, STAGES, INTERPRET), None
    elif PLANES:
        acc, squares = stream_int8(x_ptr, w_rows, w_scale_ptr + row, M, K, first, last, EVEN_K, PLANES, BM, BN, BK,
                                   STAGES), None
    else:
        acc, squares = stream(x_ptr, w_rows, norm_ptr, M, K, first, last, EVEN_K, BM, BN, BK, STAGES)
    m, n = tl.arange(0, BM)[None, :], (tile * (BN // HALVES) + tl.arange(0, BN // HALVES))[:, None]
    inside = (m < M) & (n < width)
    if res_ptr is not None:
        residual = tl.load(res_ptr + m * width + n, mask=inside)  # under way while sums are stored and added up
    if SK > 1:
        NORM: tl.constexpr = norm_ptr is not None
        tile_ptr = partial_ptr + tile * SK * (BN + 1) * BM
        if not arrive(acc, squares, tile_ptr, count_ptr + tile, split, NORM, BM, BN, SK):
            return
        acc, squares = add_up(tile_ptr, NORM, BM, BN, SK)
    if norm_ptr is not None:
        acc *= tl.rsqrt(squares / K + eps)[None, :]
    if PLANES:
        acc *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    if HALVES == 2:
        a, b = tl.split(acc.reshape(BN // 2, 2, BM).permute(0, 2, 1))
    if ROPE:
        rotate(a, b, n, m, inside, rope_ptr, slot_ptr, kv_ptr, out_ptr, M, width, S, D, KV_HEADS)
    else:
        if GATED:
            acc = a * tl.sigmoid(a) * b
        if res_ptr is not None:
            acc += residual.to(tl.float32)
        tl.store(out_ptr + m * width + n, acc, mask=inside)


@triton.jit
def rotate(a, b, n, m, inside, rope_ptr, slot_ptr, kv_ptr, out_ptr, M, width, S, D: tl.constexpr,
           KV_HEADS: tl.constexpr):
    """Pairs a, b [BN / 2, BM], number n of all pairs, of tokens m: turned, if of queries or keys, and stored."""
    head, i = n // (D // 2), n % (D // 2)
    queries = width // (D // 2) - 2 * KV_HEADS
    turns = inside & (head < queries + KV_HEADS)
    cos = tl.load(rope_ptr + m * D + i, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(rope_ptr + (M + m) * D + i, mask=turns, other=0.0).to(tl.float32)
    x, y = a * cos - b * sin, b * cos + a * sin
    query, other = inside & (head < queries), inside & (head >= queries)
    to_query = out_ptr + m * queries * D + head * D + i
    slot = tl.load(slot_ptr + m, mask=m < M, other=0)
    to_cache = kv_ptr + ((head - queries).to(tl.int64) * S + slot) * D + i  # kv is 2 KV_HEADS heads of S slots
    tl.store(to_query, x, mask=query)
    tl.store(to_query + D // 2, y, mask=query)
    tl.store(to_cache, x, mask=other)
    tl.store(to_cache + D // 2, y, mask=other)


@triton.jit
def stream(x_ptr, w_rows, norm_ptr, M, K, first, last, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           BK: tl.constexpr, STAGES: tl.constexpr):
    """Over K from first to last: w @ (norm * x).T [BN, BM] fp32, and the sum of squares of each row of x [BM].
    The tensor cores get norm * x, never x itself: a block that they read while it is also loaded into registers
    would get one buffer too few (Triton 3.6, 3.7), and be overwritten under them."""
    m = tl.arange(0, BM)[:, None]
    squares, acc = tl.zeros((BM, BK), dtype=tl.float32), tl.zeros((BN, BK if BM == 1 else BM), dtype=tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        inside = (k < K)[None, :] | EVEN_K  # folds to no mask at all
        w = tl.load(w_rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + m * K + k[None, :], mask=inside & ((m < M) | (BM == 1)), other=0.0)
        if norm_ptr is not None:
            squares += x.to(tl.float32) * x.to(tl.float32)
            x = x * tl.load(norm_ptr + k, mask=(k < K) | EVEN_K, other=0.0)[None, :]
        if BM == 1:
            acc += w.to(tl.float32) * x.to(tl.float32)
        else:
            acc = tl.dot(w, x.trans(), acc, input_precision="ieee")
    if BM == 1:
        acc = tl.sum(acc, 1)[:, None]
    return acc, tl.sum(squares, 1)


@triton.jit
def arrive(acc, squares, ptr, count_ptr, split, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           SK: tl.constexpr):
    """Store one split's sums; true for the last to do so. The shares of a tile's splits add up to 64, so its
    counter is a multiple of 64 between launches whatever SK was, and wraps around unharmed: nobody resets it."""
    ptr += split * (BN + 1) * BM
    tl.store(ptr + tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN, acc)
    if NORM:
        tl.store(ptr + BN * BM + tl.arange(0, BM), squares)
    share = tl.where(split == 0, 64 - 64 // SK * (SK - 1), 64 // SK)
    tl.debug_barrier()  # all threads have stored before one of them says so
    return (tl.atomic_add(count_ptr, share, sem="acq_rel") + share) % 64 == 0


@triton.jit
def add_up(ptr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SK: tl.constexpr):
    """The sum of a tile's partials [BN, BM] and squares [BM], first split first."""
    at = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN  # in the order of the outputs
    acc, squares = tl.zeros((BN, BM), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    for _ in tl.static_range(SK):
        acc += tl.load(ptr + at, cache_modifier=".cg")
        if NORM:
            squares += tl.load(ptr + BN * BM + tl.arange(0, BM), cache_modifier=".cg")
        ptr += (BN + 1) * BM
    return acc, squares


@triton.jit
def prefetch(w_rows, first, columns, COUNT: tl.constexpr, LINE: tl.constexpr):
    """Ask L2 for the first COUNT columns of each row, one request a line of 128 bytes."""
    k = tl.minimum(first + tl.arange(0, COUNT // LINE) * LINE, columns - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [w_rows + k[None, :]], dtype=tl.int32,
                              is_pure=False, pack=1)
