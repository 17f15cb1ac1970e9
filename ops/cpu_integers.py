"""Products with int8 weights on an x86 CPU, by the integer kernels of FBGEMM that PyTorch brings.

At batch 1 a product takes as long as reading its weights does, and integers have a quarter of fp32's bytes. A row of x
becomes integers of 7 bits, whose sums are exact on every x86 CPU (of 8 bits, AVX2's instruction that adds two products
would saturate). For weights that ask for two planes it becomes 14 bits: two rows of 7, of which the results are added.

The results of a row do not depend on the other rows, to the bit: verification chooses exactly what plain decoding does.

Shapes: M rows, K inputs, N rows of the weights.
"""
import platform
import warnings
from functools import cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ops.quantized import Quantized, in_rows, rotate

HIGHEST = 63  # the largest integer of 7 bits. With two planes, x is 128 * high + low, both from -64 to 63
PACKED = WeakTensorKeyDictionary()  # the integers of a weight -> the same in FBGEMM's order of memory


@cache
def is_supported() -> bool:
    """Whether this CPU and this PyTorch have the kernels."""
    return (platform.machine().lower() in ("x86_64", "amd64") and "fbgemm" in torch.backends.quantized.supported_engines
            and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32"))


def takes(x: Tensor, weight: object) -> bool:
    """Whether `integer_linear` computes x @ weight.T: not for int4, a GPU or float64."""
    return (isinstance(weight, Quantized) and not weight.group and x.device.type == "cpu"
            and x.dtype != torch.float64 and is_supported())


def integer_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ weight.T + bias -> [..., N] in x's dtype."""
    rows = (rotate(x) if weight.rotated else x.float()).reshape(-1, x.shape[-1])
    limit = HIGHEST * (129 if weight.planes == 2 else 1)  # 63 * 128 + 63
    top = rows.abs().amax(-1, keepdim=True)
    integers = torch.floor(rows * (limit / top.clamp(min=1e-30)) + 0.5)
    if weight.planes == 2:
        high = torch.floor((integers + 64) / 128)
        integers = torch.cat((high, integers - 128 * high))
    # FBGEMM adds 64 to make the integers unsigned
    y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(integers, 1.0, 64, packed(weight))
    if weight.planes == 2:
        high, low = y.chunk(2)
        y = 128 * high + low
    y = y * (top / limit) * weight.scale
    return (y if bias is None else y + bias).to(x.dtype).view(*x.shape[:-1], -1)


def packed(weight: Quantized) -> object:
    """The integers in FBGEMM's memory layout: a copy, made once for each `weight.data` and cached in PACKED."""
    if weight.data not in PACKED:
        data = in_rows(weight).data
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        ones = torch.ones(len(data), dtype=torch.float64)
        with warnings.catch_warnings():  # PyTorch deprecates its quantized tensors; this one is packed and dropped
            warnings.simplefilter("ignore")
            plain = torch._make_per_channel_quantized_tensor(data, ones, torch.zeros_like(ones, dtype=torch.int64), 0)
        PACKED[weight.data] = torch.ops.quantized.linear_prepack(plain, None)
        torch.backends.quantized.engine = engine
    return PACKED[weight.data]
