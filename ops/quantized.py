"""Linear layers with integer weights: 8 or 4 bits, multiplied by activations of 8 or 16 bits.

If weights were converted to floating point before they are multiplied, verifying a tree of 60 tokens would wait for
the conversion. So nothing is converted: each row of x becomes integers and one scale, and tensor cores multiply
integers by integers, twice as fast and, with int32 sums, exactly. An activation of 16 bits is two planes of 8 bits,
x = scale * (256 * high + low), and the planes are simply twice as many rows of x. This is more precise than bf16 except
where a value is below 1/256 of its row's largest. A single row of two planes, without `order`, needs no tensor cores:
the kernel that multiplies also makes the integers of 16 bits, with a scale for each 16 columns (multiply_row in
ops/integer_product.py). Not for large weights of fewer than 32,768 rows: see takes_integer_row in ops/tiling.py.

    int8      w[n, k] = scale[n] * q[n, k]                         two planes: activations lose next to nothing
    int8dyn   the same, of the rotated weights                     one plane, of the rotated x
    int4      w[n, k] = scale[g, n] * 16 q[n, k] + offset[g, n]    two planes; q from -8 to 7, g is k // group
      or      w[n, k] = scale[g, n] * (q[n, k] - zero[g, n])       where the two are fp16 instead of bf16

quantize.py writes bf16 pairs. fp16 pairs hold what others publish: fp16 scales and integer zeros exactly, and any scale
and offset eight times as closely as bf16 does.

Bits of int4 (`pack`): K is filled up with zeros to a multiple of 256. Byte k of a row holds q of column k in its low
four bits and q of column k + K / 2 in its high four bits. Others may have sorted the columns before they made groups
(GPTQ's act-order). Then `order` says which column of x each column multiplies.

The kernels for a CPU (ops/cpu_kernels.py) read the integers in another order: tiles of 16 rows, in which two columns of
each row lie side by side; of int4 they share a byte, as q + 8. A weight that they have read stays in that order
(`to_tiles`), so that memory holds it once. `unpack` and `in_rows` give the rows again.

Rotated means: each block of 16 columns was multiplied by a Hadamard matrix. That leaves w @ x.T as it is, and it
spreads an outlier over its block, which 8 bits per activation need (QuaRot, arXiv 2404.00456).

This file holds the format and its PyTorch twin. ops/integer_rows.py makes integers of x, ops/integer_product.py has the
loops that ops/linear.py's kernel runs, ops/tiling.py cuts the work, quant/ chooses the integers of the weights.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.device import tl, triton

ROTATION = 16  # columns that are rotated together; K is a multiple of it
TILE = 16  # rows
AT_ONCE = 32 * 2**20  # weights that `integer_linear` converts to floating point at a time


class Quantized(NamedTuple):
    """Weights [N, K] as integers. For int4, K is the number of columns after filling up."""
    data: Tensor  # int8 [N, K], in tiles [N / 16, K / 2, 16, 2]; for int4 [N, K / 2], in tiles [N / 16, K / 2, 16, 1]
    scale: Tensor  # fp32 [N], or for int4 scale and offset (bf16) or scale and zero (fp16) [K / group, N, 2]
    group: int  # columns that share a scale and an offset; 0: the whole row, without an offset
    planes: int  # how many planes of 8 bits an activation has: 1 or 2
    rotated: bool = False
    order: Tensor | None = None  # int32 [K before filling up]: the column of x for each column; None: the same one

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        if self.data.dim() == 4:
            tiles, pairs, rows, _ = self.data.shape
            return tiles * rows, pairs * 2
        return len(self.data), self.data.shape[1] * (2 if self.group else 1)


def pack(q: Tensor) -> Tensor:
    """Integers of four bits [N, any] -> data int8 [N, K / 2], K filled up to a multiple of 256."""
    low, high = F.pad(q.to(torch.int8), (0, -q.shape[1] % 256)).chunk(2, 1)
    return (low & 15) | (high << 4)


def unpack(weight: Quantized) -> Tensor:
    """The integers, int8 [N, K]."""
    data = in_rows(weight).data
    if not weight.group:
        return data
    return torch.cat((data << 4 >> 4, data >> 4), 1)  # shifting back extends the sign


def to_tiles(weight: Quantized) -> Tensor:
    """Put weight.data into tiles, in place, and return it. N is a multiple of 16. Every weight that shares this tensor
    sees the tiles too. The old memory is freed unless another view of it is left."""
    data, (N, K) = weight.data, weight.shape
    if data.dim() == 2:
        if weight.group:
            twos = data.contiguous().view(torch.int16)  # bytes side by side: two columns, and two of the other half
            pairs = torch.cat((twos & 15 | twos >> 4 & 240, twos >> 4 & 15 | twos >> 8 & 240), 1).bitwise_xor_(0x88)
            pairs = pairs.to(torch.uint8).view(N // TILE, TILE, K // 2)
        else:
            pairs = data.contiguous().view(torch.int16).view(N // TILE, TILE, K // 2)
        tiles = pairs.transpose(1, 2).contiguous().view(N // TILE, K // 2, TILE, 1).view(torch.int8)
        with torch.inference_mode():  # a tensor that was made in this mode is changed in no other
            data.set_(tiles)
    return data


def in_rows(weight: Quantized) -> Quantized:
    """The same weight with its data row by row; the weight itself unless it is in tiles."""
    return weight if weight.data.dim() == 2 else weight._replace(data=rows_of_data(weight))


def rows_of_data(weight: Quantized, rows: Tensor | None = None) -> Tensor:
    """`data` row by row: these rows, [any] int64, or all."""
    if weight.data.dim() == 2:
        return weight.data if rows is None else weight.data[rows]
    N, K = weight.shape
    tiles = weight.data.view(torch.int8 if weight.group else torch.int16).view(N // TILE, K // 2, TILE)
    pairs = tiles.transpose(1, 2).reshape(N, -1) if rows is None else tiles[rows // TILE, :, rows % TILE]
    if not weight.group:
        return pairs.view(torch.int8)
    return pack(torch.stack((pairs & 15, pairs >> 4 & 15), 2).flatten(1).sub_(8))


def dequantize(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """The weights [N, K], in the order of the columns of x; each is rounded once. Rotated weights stay rotated, and
    multiply `rotate(x)`."""
    stored = (dequantize_triton if weight.data.is_cuda else dequantize_torch)(weight, dtype)
    if weight.order is None:
        return stored
    K = len(weight.order)
    stored[:, :K] = stored[:, weight.order.argsort()]
    return stored


def dequantize_torch(weight: Quantized, dtype: torch.dtype) -> Tensor:
    q = unpack(weight).float()
    if not weight.group:
        return (q * weight.scale[:, None]).to(dtype)
    scale, offset = weight.scale.float().permute(2, 1, 0)[..., None]
    if weight.scale.dtype == torch.float16:
        scale, offset = scale / 16, -scale * offset
    return (q.unflatten(1, (-1, weight.group)) * 16 * scale + offset).flatten(1).to(dtype)


def dequantize_triton(weight: Quantized, dtype: torch.dtype) -> Tensor:
    """By a kernel, for prefills: it makes no other copy of the weights than the result. Scales may be a view of some
    columns of a larger weight's."""
    N, K = weight.shape
    columns = weight.data.shape[1]
    out = torch.empty(N, K, dtype=dtype, device=weight.data.device)
    scale = weight.scale.view(torch.int32) if weight.group else weight.scale  # scale and offset are one word
    has_zeros = weight.scale.dtype == torch.float16
    dequantize_kernel[N, triton.cdiv(columns, 1024)](
        weight.data, scale, out, scale.stride(0), columns, weight.group, has_zeros, 1024)
    return out


def hadamard(device: torch.device | None = None) -> Tensor:
    """The Hadamard matrix [16, 16] fp32, symmetric and its own inverse: +-1/4, negative where i & j has an odd number
    of bits."""
    i = torch.arange(ROTATION, device=device)
    bits = i[:, None] & i
    parity = sum(bits >> shift for shift in range(4)) & 1
    return (1 - 2 * parity) / math.sqrt(ROTATION)


def rotate(x: Tensor) -> Tensor:
    """Each block of 16 columns of x [..., K] times the Hadamard matrix: fp32 [..., K]. K is a multiple of 16."""
    return (x.float().unflatten(-1, (-1, ROTATION)) @ hadamard(x.device)).flatten(-2)


def quantize_rows(x: Tensor, planes: int, rotated: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of x [..., K] as integers of 8 * planes bits, held in fp32 [..., K], and their scales fp32 [..., 1]."""
    x = rotate(x) if rotated else x.float()
    limit = 127.0 if planes == 1 else 32512.0  # 32512 = 127 * 256
    top = x.abs().amax(-1, keepdim=True)
    return (x * (limit / top.clamp(min=1e-30))).add_(0.5).floor_(), top / limit


def row_parts(N: int, K: int) -> list[slice]:
    """The rows of a weight [N, K] in as few equal parts of at most AT_ONCE weights as possible; each but the last is of
    a multiple of 64 rows, since cuBLAS's products are made of tiles."""
    most = max(1, AT_ONCE // K // 64) * 64
    step = -(-N // (-(-N // most) * 64)) * 64
    return [slice(first, first + step) for first in range(0, N, step)]


def integer_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight.T + bias -> [..., N] in plain PyTorch.

    With one plane, x is quantised as in the kernel. With two planes it is not: there the kernel's integers are as good
    as x itself.
    """
    x_scale = None
    if weight.planes == 1:
        q, x_scale = quantize_rows(x, 1, weight.rotated)
        x, x_scale = q.to(x.dtype).div_(128), 128 * 128 * x_scale  # exact in any dtype, and the sums fit fp16
        del q
    elif weight.order is not None:  # cheaper than sorting the weights
        x, weight = x[..., weight.order], weight._replace(order=None)
    parts = row_parts(*weight.shape)
    if len(parts) == 1:
        return multiply_dense(x, x_scale, weight, bias)
    weight, y = in_rows(weight), x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows in parts:  # in parts, since a CUDA graph keeps the memory of its temporary tensors for good
        scale = weight.scale[:, rows] if weight.group else weight.scale[rows]
        part = weight._replace(data=weight.data[rows], scale=scale)
        y[..., rows] = multiply_dense(x, x_scale, part, None if bias is None else bias[rows])
    return y


def multiply_dense(x: Tensor, x_scale: Tensor | None, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, with all these weights in floating point at once. With x_scale [..., 1], x [..., K] holds
    integers / 128; they are multiplied by the weights' integers / 128, and x_scale makes up for both."""
    if x_scale is None:
        return F.linear(x, dequantize(weight, x.dtype)[:, :x.shape[-1]], bias)
    y = F.linear(x, unpack(weight).to(x.dtype).div_(128)).float().mul_(x_scale).mul_(weight.scale)
    return (y if bias is None else y + bias).to(x.dtype)


# ----- Kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def dequantize_kernel(data_ptr, scale_ptr, out_ptr, N, columns, GROUP: tl.constexpr, ZEROS: tl.constexpr,
                      BLOCK: tl.constexpr):
    """See `dequantize_torch`. Grid (N, blocks of a row): a program converts BLOCK bytes of one row.

    Pointers: data int8 [N, columns], scale fp32 [N] or, with GROUP, int32 [groups, N] (see `scale_of`), out [N,
    columns] or, with GROUP, [N, 2 * columns].
    """
    row, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    data = tl.load(data_ptr + row.to(tl.int64) * columns + k, mask=k < columns, other=0)
    if GROUP:
        out = out_ptr + row.to(tl.int64) * 2 * columns
        for half in tl.static_range(2):
            column = half * columns + k
            q = (data << 4 >> 4 if half == 0 else data >> 4).to(tl.float32)
            word = tl.load(scale_ptr + column // GROUP * N + row, mask=k < columns, other=0)
            tl.store(out + column, q * 16 * scale_of(word, ZEROS) + offset_of(word, ZEROS), mask=k < columns)
    else:
        tl.store(out_ptr + row.to(tl.int64) * columns + k, data.to(tl.float32) * tl.load(scale_ptr + row),
                 mask=k < columns)


@triton.jit
def scale_of(word, ZEROS: tl.constexpr):
    """What 16 q is multiplied by, fp32, from the words int32 of groups: the scale in the low half, as bf16, or with
    ZEROS as fp16. fp16 is divided here: a sixteenth of a small scale does not fit it."""
    if ZEROS:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 0.0625
    else:
        return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def offset_of(word, ZEROS: tl.constexpr):
    """The offset, fp32, in the high half of a word; with ZEROS it is minus the scale times the zero there."""
    if ZEROS:
        return zero_of(word) * scale_of(word, True)
    else:
        return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def zero_of(word):
    """What is added to 16 q, fp32: -16 times the zero, fp16, in the high half of a word."""
    return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * -16
