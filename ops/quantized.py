"""Weights of 8 or 4 bits against activations of 8 or 16, all of it integer arithmetic until a sum is complete.

Where weights are converted to floating point before they are multiplied, the conversion is what verifying a tree of
60 tokens waits for. Here nothing is converted: each row of x becomes integers and one scale, and tensor cores multiply
integers by integers, at twice the speed and, with int32 sums, exactly. 16 bits of an activation are two planes of 8,
x = scale * (256 * high + low), which are just twice as many rows of x: more precise than bf16 except where a value
is below 1/256 of its row's largest.

    int8      w[n, k] = scale[n] * q[n, k]                         two planes: the quality is that of weight-only
    int8dyn   the same, of the rotated weights                     one plane, of the rotated x
    int4      w[n, k] = scale[g, n] * 16 q[n, k] + offset[g, n]    two planes; q from -8 to 7, g is k // group

A byte of int4 holds the q of column k in its low half and that of column k + K / 2 in its high half, K filled up with
zeros to a multiple of 256. Rotated is: each block of 16 columns times a Hadamard matrix, which leaves w @ x.T as it is
and spreads an outlier over its block: what 8 bits of an activation want (QuaRot, arXiv 2404.00456).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import device_limits, tl, triton

ROTATION = 16  # columns that are rotated together; K divides by it


class Quantized(NamedTuple):
    data: Tensor  # int8 [N, K], or of int4 [N, K / 2]
    scale: Tensor  # fp32 [N], or of int4 scale and offset, bf16 [groups, N, 2]
    group: int  # columns that share a scale and an offset; 0: all of a row, and no offset
    planes: int  # of 8 bits that an activation is made of
    rotated: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """N and K, filled up."""
        return len(self.data), self.data.shape[1] * (2 if self.group else 1)


def pack(q: Tensor) -> Tensor:
    """Integers of four bits [N, K] -> data int8 [N, K / 2]."""
    low, high = F.pad(q.to(torch.int8), (0, -q.shape[1] % 256)).chunk(2, 1)
    return low & 15 | high << 4


def unpack(weight: Quantized) -> Tensor:
    """-> integers int8 [N, K]."""
    return torch.cat((weight.data << 4 >> 4, weight.data >> 4), 1) if weight.group else weight.data


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """[N, K], filled up; each weight rounded once."""
    return (dequantize_triton if weight.data.is_cuda else dequantize_torch)(weight, dtype)


def dequantize_torch(weight: Quantized, dtype: torch.dtype) -> Tensor:
    q = unpack(weight).float()
    if not weight.group:
        return (q * weight.scale[:, None]).to(dtype)
    scale, offset = weight.scale.float().permute(2, 1, 0)[..., None]
    return (q.unflatten(1, (-1, weight.group)) * 16 * scale + offset).flatten(1).to(dtype)


def dequantize_triton(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """For prefills, which want no other copy of the weights than this."""
    (N, K), columns = weight.shape, weight.data.shape[1]
    out = torch.empty(N, K, dtype=dtype, device=weight.data.device)
    scale = weight.scale.view(torch.int32) if weight.group else weight.scale  # scale and offset are one word
    dequantize_kernel[N, triton.cdiv(columns, 1024)](weight.data, scale, out, N, columns, weight.group, 1024)
    return out


def hadamard(device: torch.device | None = None) -> Tensor:
    """[16, 16] fp32, symmetric, its own inverse: +-1/4, negative where i & j has an odd number of bits."""
    i = torch.arange(ROTATION, device=device)
    bits = i[:, None] & i
    parity = sum(bits >> shift for shift in range(4)) & 1
    return (1 - 2 * parity) / math.sqrt(ROTATION)


def rotate(x: Tensor) -> Tensor:
    """[..., K] fp32, K a multiple of 16: each block of 16 columns times the Hadamard matrix."""
    return (x.float().unflatten(-1, (-1, ROTATION)) @ hadamard(x.device)).flatten(-2)


def quantize_rows(x: Tensor, planes: int, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """[..., K] -> integers of 8 * planes bits as fp32 [..., K], and scales fp32 [..., 1]."""
    x, limit = rotate(x) if rotated else x.float(), 127.0 if planes == 1 else 32512.0  # 127 * 256
    top = x.abs().amax(-1, keepdim=True)
    return torch.floor(x * (limit / top.clamp(min=1e-30)) + 0.5), top / limit


def integer_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., K] -> x @ weight.T + bias [..., N] in plain PyTorch. With one plane as the kernel has it; with two, where
    the kernel's activations are as good as x itself, of x itself."""
    if weight.planes == 2:
        return F.linear(x, dequantize(weight, x.dtype)[:, :x.shape[-1]], bias)
    q, scale = quantize_rows(x, 1, weight.rotated)
    q, w = (t.to(x.dtype).div_(128) for t in (q, weight.data))  # exact in any dtype, and fp16 has room for their sums
    y = F.linear(q, w).float() * (128 * 128 * scale) * weight.scale
    return (y if bias is None else y + bias).to(x.dtype)


def quantize_triton(x: Tensor, weight: Quantized, norm: tuple[Tensor, float] | None, pdl: bool
                    ) -> tuple[Tensor, Tensor, Tensor | None]:
    """[M, K], normed or not -> its planes, high first, int8 [planes, M, K], scales fp32 [M], and where weights come in
    groups the sum of each group's integers fp32 [groups, M]."""
    (M, K), (g, eps), groups = x.shape, norm or (None, 0.0), len(weight.scale) if weight.group else 0
    out, scale = x.new_empty(weight.planes, M, K, dtype=torch.int8), x.new_empty(M, dtype=torch.float32)
    sums = x.new_empty(groups, M, dtype=torch.float32) if groups else None
    padded, pdl = max(1024, triton.next_power_of_2(K)), pdl and device_limits(x.device)[1] >= (9, 0)
    quantize_kernel[(M,)](x, g, out, scale, sums, groups, eps, M, K, padded, weight.planes, weight.group,
                          weight.rotated, pdl, num_warps=min(8, padded // 512),
                          **({"launch_pdl": True} if pdl else {}))
    return out, scale, sums


def integer_config(M: int, N: int, columns: int, planes: int, group: int, sms: int, capability: tuple[int, int]
                   ) -> tuple[int, ...]:
    """A linears.Config for N rows of `columns` bytes and M rows of x, measured on an H100 (BENCHMARKS.md); elsewhere
    two programs share a multiprocessor's 99 KB. Two planes are twice the rows, and Hopper wants 16."""
    BM = (8 if planes == 2 else 16) if M <= 8 else 16 if M <= 16 else 32 if M <= 32 else 64
    rows, tiles, hopper, warps, BN = planes * BM, -(-N // 64), capability >= (9, 0), 4, 64
    narrow = tiles < sms
    crowded = rows == 128 and group and not hopper  # all of the registers of four warps would not do
    if columns < 1024 and not crowded:  # all of a tile's weights in flight
        BK, stages = max(64, group), 3 if group else 9 if rows < 64 else 6 if rows < 128 else 4
        return BM, BN, BK, 1, 4, stages if hopper else min(stages, 4), 0
    if not hopper:  # 99 KB of shared memory: 48 of them a program, where they suffice
        BK, SK, stages = 128, -(-2 * sms // tiles) if narrow else 1, 4 if rows < 64 else 3
        if crowded:
            BN, BK, warps, stages = 128, group, 8, 3
    elif group:
        BK, SK, stages = 128, 2 if tiles < 2 * sms or rows <= 16 else 1, 4 if rows < 64 else 3
        if narrow and rows < 128 and 2 * tiles > sms:  # two splits would make a wave and a half
            SK, stages = 4, 6 if rows <= 16 else 4
        elif narrow:
            BK, SK, stages = (128, 4, 3) if rows == 128 else (256, 2, 3 if rows == 64 else 6)
        elif rows <= 32 and tiles > 3 * sms:
            BK, SK, stages = 256, 1, 3
        elif rows == 64 and tiles > 3 * sms:
            stages = 4
    else:
        BK, SK, stages = (256, 1, 6 if rows <= 16 else 4) if rows < 64 else (128, 1, 4)
        if narrow:
            SK, (BK, stages) = sms // tiles, (128, 8) if rows == 128 else (256, 6)
    while columns % BK and BK > max(64, group):
        BK //= 2
    SK = max(1, min(SK, columns // BK // 4, 64))
    return BM, BN, BK, SK, warps, stages, max(1, (256 if group else 1024) // BK)


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(x_ptr, norm_ptr, out_ptr, scale_ptr, sums_ptr, groups, eps, M, K: tl.constexpr,
                    PADDED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ROTATED: tl.constexpr,
                    PDL: tl.constexpr):
    """One row: RMSNorm if there is a norm, rotation if there are blocks, its largest value, its integers."""
    k, row = tl.arange(0, PADDED), tl.program_id(0).to(tl.int64)
    if norm_ptr is not None:
        g = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    y = x
    if norm_ptr is not None:
        y = x * g  # what the norm divides by changes the scale, not the integers
    if ROTATED:
        y = spread(y, PADDED)
    LIMIT: tl.constexpr = 127.0 if PLANES == 1 else 32512.0
    if norm_ptr is not None:
        top, squares = tl.reduce((tl.abs(y), x * x), 0, top_and_sum)
        tl.store(scale_ptr + row, top / LIMIT * tl.rsqrt(squares / K + eps))
    else:
        top = tl.max(tl.abs(y), 0)
        tl.store(scale_ptr + row, top / LIMIT)
    q = tl.floor(y * (LIMIT / tl.maximum(top, 1e-30)) + 0.5).to(tl.int32)
    if GROUP:
        group = tl.arange(0, PADDED // GROUP)
        sums = tl.sum(q.reshape(PADDED // GROUP, GROUP), 1).to(tl.float32)
        tl.store(sums_ptr + group * M + row, sums, mask=group < groups)
    if PLANES == 2:
        high = (q + 128) >> 8
        tl.store(out_ptr + row * K + k, high.to(tl.int8), mask=k < K)
        q -= high * 256
        row += M
    tl.store(out_ptr + row * K + k, q.to(tl.int8), mask=k < K)


@triton.jit
def top_and_sum(top, total, other_top, other_total):
    return tl.maximum(top, other_top), total + other_total


@triton.jit
def spread(x, SIZE: tl.constexpr):
    """Each 16 elements of x [SIZE] fp32 times the Hadamard matrix, by sums and differences."""
    return pairs(pairs(pairs(pairs(x, 1, SIZE), 2, SIZE), 4, SIZE), 8, SIZE) * 0.25


@triton.jit
def pairs(x, STEP: tl.constexpr, SIZE: tl.constexpr):
    """Sum and difference of elements STEP apart, in their places."""
    a, b = tl.split(x.reshape(SIZE // STEP // 2, 2, STEP).permute(0, 2, 1))
    return tl.join(a + b, a - b).permute(0, 2, 1).reshape(SIZE)


@triton.jit
def dequantize_kernel(data_ptr, scale_ptr, out_ptr, N, columns, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """One row's BLOCK bytes."""
    row, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    data = tl.load(data_ptr + row.to(tl.int64) * columns + k, mask=k < columns, other=0)
    if GROUP:
        out = out_ptr + row.to(tl.int64) * 2 * columns
        for half in tl.static_range(2):
            column = half * columns + k
            q = (data << 4 >> 4 if half == 0 else data >> 4).to(tl.float32)
            word = tl.load(scale_ptr + column // GROUP * N + row, mask=k < columns, other=0)
            scale, offset = (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
            tl.store(out + column, q * 16 * scale + offset, mask=k < columns)
    else:
        tl.store(out_ptr + row.to(tl.int64) * columns + k, data.to(tl.float32) * tl.load(scale_ptr + row),
                 mask=k < columns)


@triton.jit
def nibbles(packed, INTERPRET: tl.constexpr):
    """int8 -> 16 times its low half and 16 times its high half, as signed numbers: what is left of a byte when the
    other half is masked out. int8 each."""
    if INTERPRET:
        return packed << 4, packed & -16
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a; shl.b32 a, $2, 4; and.b32 $0, a, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }",
            "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)


@triton.jit
def stream_int8(x_ptr, w_rows, scales, M, K, first, last, EVEN_K: tl.constexpr, PLANES: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr):
    """Over K from first to last: w @ x.T [BN, BM] fp32. All planes of x go through one product, BM rows of each."""
    r = tl.arange(0, PLANES * BM)[:, None]
    live, x_rows = r % BM < M, x_ptr + (r // BM * M + r % BM).to(tl.int64) * K
    acc = tl.zeros((BN, PLANES * BM), dtype=tl.int32)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        k = (start + tl.arange(0, BK))[None, :]
        inside = (k < K) | EVEN_K  # folds to no mask at all
        w = tl.load(w_rows + k, mask=inside, other=0, eviction_policy="evict_first")
        x = tl.load(x_rows + k, mask=inside & live, other=0)
        acc = tl.dot(w, x.trans(), acc, out_dtype=tl.int32)
    return joined(acc, 256.0, PLANES, BM, BN) * tl.load(scales)[:, None]


@triton.jit
def stream_int4(x_ptr, sums_ptr, w_rows, row, scale_ptr, M, N, K, half, first, last, EVEN_K: tl.constexpr,
                GROUP: tl.constexpr, GROUPS: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, INTERPRET: tl.constexpr):
    """Over the bytes of a row from first to last: w @ x.T [BN, BM] fp32, scaled."""
    r, b = tl.arange(0, PLANES * BM)[:, None], tl.arange(0, GROUP)[None, :]
    live, x_rows = r % BM < M, x_ptr + (r // BM * M + r % BM).to(tl.int64) * K
    acc = offsets(sums_ptr, scale_ptr, row, M, N, half * 2 // GROUP, first == 0, GROUPS, BM, INTERPRET)
    for start in tl.range(first, last, BK, num_stages=STAGES):
        for part in tl.static_range(0, BK, GROUP):
            at = start + part
            k, g, h = at + b, at // GROUP, (at + half) // GROUP
            inside = (at < half) | EVEN_K
            w = tl.load(w_rows + k, mask=inside, other=0, eviction_policy="evict_first")
            x = tl.load(x_rows + k, mask=live & ((k < K) & inside | EVEN_K), other=0)
            y = tl.load(x_rows + half + k, mask=live & ((half + k < K) | EVEN_K), other=0)
            low, high = nibbles(w, INTERPRET)
            scale = tl.load(scale_ptr + g * N + row, mask=inside, other=0) << 16
            dot = tl.dot(low, x.trans(), out_dtype=tl.int32)
            acc += joined(dot, 256, PLANES, BM, BN) * scale.to(tl.float32, bitcast=True)[:, None]
            scale = tl.load(scale_ptr + h * N + row, mask=inside, other=0) << 16
            dot = tl.dot(high, y.trans(), out_dtype=tl.int32)
            acc += joined(dot, 256, PLANES, BM, BN) * scale.to(tl.float32, bitcast=True)[:, None]
    return acc


@triton.jit
def offsets(sums_ptr, scale_ptr, row, M, N, groups, live, GROUPS: tl.constexpr, BM: tl.constexpr,
            INTERPRET: tl.constexpr):
    """Of all groups: offset [BN] times the group's sum of x [BM], [BN, BM] fp32; 0 if not live. A sum is two bf16,
    16 bits of its 22."""
    g, m = tl.arange(0, GROUPS), tl.arange(0, BM)
    word = tl.load(scale_ptr + g[None, :] * N + row[:, None], mask=(g < groups)[None, :] & live, other=0)
    offset = (word & -65536).to(tl.float32, bitcast=True)
    sums = tl.load(sums_ptr + g[:, None] * M + m[None, :], mask=(g < groups)[:, None] & (m < M)[None, :] & live,
                   other=0.0)
    if INTERPRET:
        return tl.dot(offset, sums, input_precision="ieee")
    else:
        high = sums.to(tl.bfloat16)
        low = (sums - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(offset.to(tl.bfloat16), low, tl.dot(offset.to(tl.bfloat16), high))


@triton.jit
def joined(dot, HIGH: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """int32 [BN, PLANES * BM] -> [BN, BM] fp32: HIGH * high + low, summed as HIGH is: of a group as integers."""
    if PLANES == 2:
        high, low = tl.split(dot.reshape(BN, 2, BM).permute(0, 2, 1))
        dot = high * HIGH + low
    return dot.to(tl.float32)
