"""The kernel that makes integers of x, for products with integer weights. ops/quantized.py says what they mean, and
`quantize_rows` there is its PyTorch twin.

Beside a row's integers it writes their scale and, for weights in groups, their sum in each group. RMSNorm, the rotation
and the order of columns cost next to nothing here, where every number passes through registers once.
"""
import torch
from torch import Tensor

from ops.device import pdl_options, tl, triton, wait_for_previous
from ops.quantized import Quantized


def quantize_triton(x: Tensor, weight: Quantized, norm: tuple[Tensor, float] | None
                    ) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the kernel multiplies the weights by, of x [M, K], normed first if there is a norm (weight [K], eps).

    Returns the planes int8 [planes, M, K], high before low; the scales fp32 [M]; and, if weights have groups, the sum
    of the integers of each group fp32 [groups, M], which the offsets are multiplied by.
    """
    M, K = x.shape
    norm_weight, eps = norm or (None, 0.0)
    groups = len(weight.scale) if weight.group else 0
    out = x.new_empty(weight.planes, M, K, dtype=torch.int8)
    scale = x.new_empty(M, dtype=torch.float32)
    sums = x.new_empty(groups, M, dtype=torch.float32) if groups else None
    padded = max(1024, triton.next_power_of_2(K))
    quantize_kernel[(M,)](x, norm_weight, weight.order, out, scale, sums, groups, eps, M, K, padded, weight.planes,
                          weight.group, weight.rotated, num_warps=min(8, padded // 512), **pdl_options(x.device))
    return out, scale, sums


@triton.jit(do_not_specialize=["M"])
def quantize_kernel(x_ptr, norm_ptr, order_ptr, out_ptr, scale_ptr, sums_ptr, groups, eps, M, K: tl.constexpr,
                    PADDED: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr, ROTATED: tl.constexpr,
                    PDL: tl.constexpr):
    """See `quantize_triton`. Grid (M): a program does one row: RMSNorm, rotation, its largest value, its integers.

    Pointers: x [M, K], norm [K] (or None), order int32 [K] (or None), out int8 [PLANES, M, K], scale fp32 [M], sums
    fp32 [groups, M] (or None). PADDED is K rounded up to a power of two, at least 1024.
    """
    k, row = tl.arange(0, PADDED), tl.program_id(0).to(tl.int64)
    column = k
    if order_ptr is not None:
        column = tl.load(order_ptr + k, mask=k < K, other=0)
    if norm_ptr is not None:
        g = tl.load(norm_ptr + column, mask=k < K, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * K + column, mask=k < K, other=0.0).to(tl.float32)
    y = x
    if norm_ptr is not None:
        y = x * g  # the norm's divisor changes the scale alone, not the integers
    if ROTATED:
        y = rotate_blocks(y, PADDED)
    LIMIT: tl.constexpr = 127.0 if PLANES == 1 else 32512.0
    if norm_ptr is not None:
        top, squares = tl.reduce((tl.abs(y), x * x), 0, max_and_sum)
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
def max_and_sum(top, total, other_top, other_total):
    """Combines two pairs in a tl.reduce: the larger maximum, and the sum of both sums."""
    return tl.maximum(top, other_top), total + other_total


@triton.jit
def rotate_blocks(x, SIZE: tl.constexpr):
    """`rotate` of x [SIZE] fp32, by sums and differences (a fast Walsh-Hadamard transform of each 16 elements)."""
    return butterfly(butterfly(butterfly(butterfly(x, 1, SIZE), 2, SIZE), 4, SIZE), 8, SIZE) * 0.25


@triton.jit
def butterfly(x, STEP: tl.constexpr, SIZE: tl.constexpr):
    """Replace each two elements of x [SIZE] that lie STEP apart by their sum and their difference."""
    a, b = tl.split(x.reshape(SIZE // STEP // 2, 2, STEP).permute(0, 2, 1))
    return tl.join(a + b, a - b).permute(0, 2, 1).reshape(SIZE)
