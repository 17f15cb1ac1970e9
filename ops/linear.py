"""A linear layer for 1 to 128 rows that reads its weights at the speed of memory, RMSNorm, SiLU and residual fused in.

At batch 1, a decode step spends its time reading weights, and a tree of 60 tokens reads them as often as one token
does: once. So one Triton kernel serves every number of rows. A program owns BN rows of the weights, reads them once,
and does in the same pass everything else that a Llama layer does around a matrix product:

    rms_norm(x) @ w.T  =  rstd[m] * sum_k w[n, k] * (g[k] * x[m, k])     rstd is known when the sum is, so it comes last
    silu(gate) * up                                                       rows of gate and up are interleaved in a tile
    RoPE and the cache write                                              so are the two halves of a head
    ... + bias, ... + residual                                            in fp32, rounded once

If N is too small to occupy the GPU, several programs split K. Each stores its fp32 partial sums, and the one that
finishes last adds all of them up in a fixed order: the bits do not depend on which one that is. With more than 16 rows
the norm gets a kernel of its own: x * g has to pass through registers, and every product would wait for it.

Weights of 8 or 4 bits go through the same kernel, with the loops of ops/integer_product.py. ops/tiling.py chooses the
sizes of the blocks.

Letters: M rows of x, K inputs, N rows of the weights; width = N or, gated, N / 2 outputs; D head dim, S cache slots.
"""
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import cpu_integers, cpu_kernels
from ops.device import INTERPRET, device_limits, pdl_options, tl, triton, wait_for_previous
from ops.embed_rope import rope_store
from ops.integer_product import multiply_integers
from ops.integer_rows import quantize_triton
from ops.quantized import Quantized, integer_linear
from ops.tiling import Tiling, integer_config, linear_config

MAX_ROWS = 128  # beyond, a matrix product is no longer bound by memory and cuBLAS is the better choice
MAX_TILES = 4096  # counters kept for split K
NORM_ROWS = 16  # up to this many rows the norm is fused, except in fp16 (see linear_triton)


def linear(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None, norm: tuple[Tensor, float] | None = None,
           residual: Tensor | None = None, gated: bool = False, rope_cache: tuple[Tensor, Tensor, Tensor] | None = None,
           dtype: torch.dtype | None = None) -> Tensor:
    """residual + f(rms_norm(x) @ weight.T + bias), each part but the product optional: [..., width].

    x [..., K], weight [N, K], bias [N], norm (weight [K], eps), residual [..., width].
    gated: the first N / 2 rows of the weights are the gate's, the others up's, and f is silu(gate) * up.
    rope_cache (rope [2, M, D], slots int64 [M], kv [2, KV_HEADS, S, D]), x [M, K]: the outputs are queries, keys,
    values. Rotated queries [M, H * D] are returned; rotated keys, and values, are stored in kv (embed_rope.rope_store).
    dtype: of the output, by default x's. fp32 keeps the kernel's fp32 sums (bf16 logits near 20 are 0.125 apart); where
    linear_torch runs, the result is rounded to x's dtype first.
    """
    if cpu_kernels.takes_linear(x, weight, bias, norm and norm[0], residual):
        if rope_cache is None or cpu_kernels.takes_heads(rope_cache[2]):
            return cpu_kernels.linear(x, weight, bias, norm, residual, gated, rope_cache)
        return rope_store(cpu_kernels.linear(x, weight, bias, norm), *rope_cache).flatten(1)
    rows, K = x.numel() // x.shape[-1], x.shape[-1]
    if (not x.is_cuda or rows > MAX_ROWS or K % 16 or x.dtype not in (torch.bfloat16, torch.float16)
            or wants_gradients(x, weight, bias, residual, *(norm or ()))):
        y = linear_torch(x, weight, bias, norm, residual, gated, fast=True)
        return y.to(dtype or y.dtype) if rope_cache is None else rope_store(y, *rope_cache).flatten(1)
    flat = None if residual is None else residual.reshape(rows, -1)
    return linear_triton(x.reshape(rows, K), weight, bias, norm, flat, gated, rope_cache, dtype).view(*x.shape[:-1], -1)


def wants_gradients(*tensors: object) -> bool:
    """Whether autograd follows one of these. Our kernels have no backward pass, and autograd would not say so: what is
    before them would get no gradient."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def linear_torch(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None,
                 norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None,
                 gated: bool = False, fast: bool = False) -> Tensor:
    """`linear` in plain PyTorch, without rope_cache and dtype: each step is rounded to x's dtype. fast: with a CPU's
    kernels, which for int8 round x to 14 or 7 bits."""
    if norm is not None:
        x = rms_norm(x, *norm) if fast else F.rms_norm(x, x.shape[-1:], *norm)
    if fast and cpu_integers.takes(x, weight):
        y = cpu_integers.integer_linear(x, weight, bias)
    else:
        y = (integer_linear if isinstance(weight, Quantized) else float_linear)(x, weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x [..., K]; for a few rows of fp32 on a CPU by a product that is faster there."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or x.dtype != torch.float32 or rows > 64 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    # MKL (2024.2 on an AMD EPYC with AVX2, two threads) takes 1.5 to 3 times as long for x @ weight.T as for
    # weight @ x.T with 2 to 48 rows. On one thread only up to 4 rows. bf16 has no such gap.
    if rows == 1 or rows > 4 and torch.get_num_threads() == 1:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(rows, -1).t()).t().contiguous().view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def linear_triton(x: Tensor, weight: Tensor | Quantized, bias: Tensor | None = None,
                  norm: tuple[Tensor, float] | None = None, residual: Tensor | None = None, gated: bool = False,
                  rope_cache: tuple[Tensor, Tensor, Tensor] | None = None, dtype: torch.dtype | None = None,
                  config: Tiling | None = None) -> Tensor:
    """`linear` by the kernel, of x [M, K] with M <= MAX_ROWS. config: by default that of ops/tiling.py."""
    M, K = x.shape
    N = weight.shape[0]
    integers = isinstance(weight, Quantized)
    data, w_scale, group, planes, *_ = weight if integers else (weight, None, 0, 0)
    columns = data.shape[1]  # of int4: bytes, two weights each
    if config is None and integers:
        rows = M if weight.order is None else max(M, 2)  # one row would not be sorted: quantize_triton does that
        config = integer_config(rows, N, columns, planes, group, *device_limits(x.device))
    elif config is None:
        config = linear_config(M, N, K, *device_limits(x.device))
    BM, BN, BK, SK, warps, stages, ahead, unroll = config
    tiles = triton.cdiv(N, BN)
    width = N // 2 if gated or rope_cache else N
    rope, slots, kv = rope_cache or (None, None, None)
    kv_heads, num_slots, D = kv.shape[1:] if rope_cache else (0, 0, 2)
    assert kv is None or (kv.is_contiguous() and rope.is_contiguous() and not gated)
    assert M <= BM and data.is_contiguous() and (SK == 1 or tiles <= MAX_TILES)
    assert not group or SK <= triton.cdiv(columns, BK), "an empty split would add the offsets once more"
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = x.new_empty(M, N - 2 * kv_heads * D if rope_cache else width, dtype=dtype)
    norm_weight, eps = norm or (None, 0.0)
    x_scale = sums = None
    if integers and BM == 1:  # the kernel makes integers of x
        planes = 0
    elif integers:  # x is normed while it is quantised
        x, x_scale, sums = quantize_triton(x, weight, norm)
        norm_weight = None
    elif norm_weight is not None and (M > NORM_ROWS or x.dtype == torch.float16):  # g * x may exceed fp16's range
        x = norm_triton(x, norm_weight, eps)
        norm_weight = None
    groups, has_zeros = 0, False
    if group:
        has_zeros = w_scale.dtype == torch.float16
        w_scale = w_scale.view(torch.int32)  # the two numbers of a group are one word
        groups = max(16, triton.next_power_of_2(len(w_scale)))
    partial = counts = None
    if SK > 1:
        partial = out.new_empty(tiles * SK * (BN + 1) * BM, dtype=torch.float32)
        counts = counters(x.device)
    linear_kernel[(tiles * SK,)](
        x, data, bias, norm_weight, eps, residual, out, partial, counts, rope, slots, kv, x_scale, sums, w_scale,
        M, width, K, columns, num_slots, D=D, KV_HEADS=kv_heads, GATED=gated,
        EVEN_K=columns % BK == 0 and K == weight.shape[1], BM=BM, BN=BN, BK=BK, SK=SK, STAGES=stages, AHEAD=ahead,
        UNROLL=unroll, PLANES=planes, GROUP=group, GROUPS=groups, ZEROS=has_zeros, INTERPRET=INTERPRET,
        num_warps=warps, **pdl_options(x.device))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm of x [..., K], in x's dtype. By a kernel where there is one and gradients are not wanted."""
    if cpu_kernels.takes_rows(x) and weight.dtype == torch.float32:
        return cpu_kernels.rms_norm(x, weight, eps)
    if not x.is_cuda or wants_gradients(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    return norm_triton(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps).view(x.shape)


def norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the rows of x [M, K], which is contiguous."""
    M, K = x.shape
    out = torch.empty_like(x)
    norm_kernel[(M,)](x, weight, out, eps, K, triton.next_power_of_2(K), num_warps=8, **pdl_options(x.device))
    return out


@cache
def counters(device: torch.device) -> Tensor:
    """The counters of split K, int32 [MAX_TILES], one for each tile (see `store_split`). All calls on a stream share
    them. The first call allocates them, so call this once before capturing a graph."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.jit
def norm_kernel(x_ptr, norm_ptr, out_ptr, eps, K: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """RMSNorm. Grid (M): a program norms one row. Pointers: x and out [M, K], norm [K]. PADDED is K rounded up to a
    power of two."""
    k = tl.arange(0, PADDED)
    g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + tl.program_id(0) * K + k, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0) * K + k, x * tl.rsqrt(tl.sum(x * x, 0) / K + eps) * g, mask=k < K)


# The kernel of `linear`. Grid (tiles * SK): a program multiplies BN rows of the weights by all rows of x, over 1 / SK
# of the columns. A pointer that is None leaves its step out. EVEN_K: no block crosses the end of K. INTERPRET: no
# assembly.
@triton.jit(do_not_specialize=["M"])  # one compiled kernel for every M up to BM
def linear_kernel(
        x_ptr, w_ptr, bias_ptr, norm_ptr, eps, res_ptr, out_ptr,  # x [M, K] (or int8: [PLANES, M, K]), w [N, columns]
        partial_ptr, count_ptr,  # split K: fp32 [tiles, SK, (BN + 1) BM], int32 [tiles]; see store_split
        rope_ptr, slot_ptr, kv_ptr,  # RoPE and the cache write: [2, M, D], int64 [M], [2, KV_HEADS, S, D]
        x_scale_ptr, sums_ptr, w_scale_ptr,  # integers: fp32 [M]; fp32 [groups, M]; fp32 [N] or int32 [groups, N]
        M, width, K, columns, S, D: tl.constexpr, KV_HEADS: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SK: tl.constexpr, STAGES: tl.constexpr,
        AHEAD: tl.constexpr, UNROLL: tl.constexpr, PDL: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr,
        GROUPS: tl.constexpr, ZEROS: tl.constexpr, INTERPRET: tl.constexpr):
    tile, split = tl.program_id(0) // SK, tl.program_id(0) % SK
    ROPE: tl.constexpr = rope_ptr is not None
    HALVES: tl.constexpr = 2 if GATED or ROPE else 1  # rows of the weights that one output pairs
    r = tl.arange(0, BN)
    col = tl.minimum(tile * (BN // HALVES) + r // HALVES, width - 1)  # a ragged last tile reads its last row again
    if ROPE:  # even rows of the tile are from the first half of a head, odd ones what RoPE pairs them with
        row = col // (D // 2) * D + col % (D // 2) + r % 2 * (D // 2)
    else:  # gated: even rows are gate's, odd ones up's
        row = col + r % HALVES * width
    w_rows = w_ptr + row.to(tl.int64)[:, None] * columns
    blocks = tl.cdiv(columns, BK)
    first, last = split * blocks // SK * BK, (split + 1) * blocks // SK * BK
    if PDL:  # as wait_for_previous; but weights depend on no kernel, so they may be fetched before the wait
        tl.extra.cuda.gdc_launch_dependents()
        if AHEAD:
            prefetch(w_rows, first, columns, AHEAD * BK, 64 if w_scale_ptr is None else 128)
        tl.extra.cuda.gdc_wait()
    if w_scale_ptr is not None:
        acc, squares = multiply_integers(
            x_ptr, sums_ptr, w_rows, row, w_scale_ptr, norm_ptr, M, width * HALVES, K, columns, first, last, EVEN_K,
            GROUP, GROUPS, ZEROS, PLANES, BM, BN, BK, STAGES, UNROLL, INTERPRET)
    else:
        acc, squares = multiply(x_ptr, w_rows, norm_ptr, M, K, first, last, EVEN_K, BM, BN, BK, STAGES, UNROLL)
    m, n = tl.arange(0, BM)[None, :], (tile * (BN // HALVES) + tl.arange(0, BN // HALVES))[:, None]
    inside = (m < M) & (n < width)
    if res_ptr is not None:
        residual = tl.load(res_ptr + m * width + n, mask=inside)  # on its way while sums are stored and added up
    if SK > 1:
        NORM: tl.constexpr = norm_ptr is not None
        tile_ptr = partial_ptr + tile * SK * (BN + 1) * BM
        if not store_split(acc, squares, tile_ptr, count_ptr + tile, split, NORM, BM, BN, SK):
            return
        acc, squares = sum_splits(tile_ptr, NORM, BM, BN, SK)
    if norm_ptr is not None:
        acc *= tl.rsqrt(squares / K + eps)[None, :]
    if PLANES:
        acc *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    if HALVES == 2:
        a, b = tl.split(acc.reshape(BN // 2, 2, BM).permute(0, 2, 1))
    if ROPE:
        rope_and_store(a, b, n, m, inside, rope_ptr, slot_ptr, kv_ptr, out_ptr, M, width, S, D, KV_HEADS)
    else:
        if GATED:
            acc = a * tl.sigmoid(a) * b
        if res_ptr is not None:
            acc += residual.to(tl.float32)
        tl.store(out_ptr + m * width + n, acc, mask=inside)


@triton.jit
def rope_and_store(a, b, n, m, inside, rope_ptr, slot_ptr, kv_ptr, out_ptr, M, width, S, D: tl.constexpr,
                   KV_HEADS: tl.constexpr):
    """Rotate the pairs of queries and keys, then store queries in out [M, H, D], keys and values in the cache.

    a, b [BN / 2, BM]: first and second halves; n [BN / 2, 1]: the number of each pair among all pairs of a token's
    heads; m [1, BM]: the tokens. Pointers: see `linear_kernel`.
    """
    head, i = n // (D // 2), n % (D // 2)
    queries = width // (D // 2) - 2 * KV_HEADS
    rotates = inside & (head < queries + KV_HEADS)
    cos = tl.load(rope_ptr + m * D + i, mask=rotates, other=1.0).to(tl.float32)
    sin = tl.load(rope_ptr + (M + m) * D + i, mask=rotates, other=0.0).to(tl.float32)
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
def multiply(x_ptr, w_rows, norm_ptr, M, K, first, last, EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BK: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr):
    """w @ (norm * x).T over columns first to last, fp32 [BN, BM], and the sum of squares of each row of x [BM].
    w_rows [BN, 1] points to the first column of each row.

    The tensor cores get norm * x, never x itself: Triton 3.6 and 3.7 give a block that is read by the tensor cores and
    also loaded into registers one buffer too few, and it would be overwritten while they read it.
    """
    m = tl.arange(0, BM)[:, None]
    squares = tl.zeros((BM, BK), dtype=tl.float32)
    acc = tl.zeros((BN, BK if BM == 1 else BM), dtype=tl.float32)
    for start in tl.range(first, last, BK, num_stages=STAGES, loop_unroll_factor=UNROLL):
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
def store_split(acc, squares, ptr, count_ptr, split, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                SK: tl.constexpr):
    """Store the sums of one split, and return true if all splits of the tile have now stored theirs.

    ptr: the tile's fp32 [SK, (BN + 1) BM]: sums [BM, BN], then BM squares. Each split adds a share to the tile's
    counter, and the shares of all splits add up to 64. So between launches a counter is a multiple of 64, whatever SK
    was; it may wrap around, and nothing has to reset it.
    """
    ptr += split * (BN + 1) * BM
    tl.store(ptr + tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN, acc)
    if NORM:
        tl.store(ptr + BN * BM + tl.arange(0, BM), squares)
    share = tl.where(split == 0, 64 - 64 // SK * (SK - 1), 64 // SK)
    tl.debug_barrier()  # all threads have stored before one of them adds the share
    return (tl.atomic_add(count_ptr, share, sem="acq_rel") + share) % 64 == 0


@triton.jit
def sum_splits(ptr, NORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SK: tl.constexpr):
    """What the splits of a tile stored, added up in their order: sums [BN, BM] and squares [BM]."""
    at = tl.arange(0, BN)[:, None] + tl.arange(0, BM)[None, :] * BN  # in the order of the outputs
    acc, squares = tl.zeros((BN, BM), dtype=tl.float32), tl.zeros((BM,), dtype=tl.float32)
    if BM > 64:  # not unrolled: registers hold the sums of one split beside `acc`. So many rows have no norm here
        for split in tl.range(0, SK, num_stages=1):
            acc += tl.load(ptr + split * (BN + 1) * BM + at, cache_modifier=".cg")
    else:
        for _ in tl.static_range(SK):
            acc += tl.load(ptr + at, cache_modifier=".cg")
            if NORM:
                squares += tl.load(ptr + BN * BM + tl.arange(0, BM), cache_modifier=".cg")
            ptr += (BN + 1) * BM
    return acc, squares


@triton.jit
def prefetch(w_rows, first, columns, COUNT: tl.constexpr, LINE: tl.constexpr):
    """Ask L2 for COUNT columns of each row from `first` on, one request for each line of 128 bytes (LINE columns)."""
    k = tl.minimum(first + tl.arange(0, COUNT // LINE) * LINE, columns - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; // $0", "=r,l", [w_rows + k[None, :]], dtype=tl.int32,
                              is_pure=False, pack=1)
