"""ops/cpu_integers.py: int8 products on a CPU against float64, row by row."""
import gc

import pytest
import torch

from ops import cpu_integers
from ops.cpu_integers import PACKED, integer_linear, packed, takes
from ops.linear import linear
from ops.quantized import dequantize, rotate
from quant.linear import quantize_weight

pytestmark = pytest.mark.skipif(not cpu_integers.is_supported(), reason="this CPU has no FBGEMM")


@pytest.mark.parametrize("mode, most", [("int8", 3e-4), ("int8dyn", 0.04)])
def test_values(mode: str, most: float) -> None:
    """Fails if an integer saturates (the first rows are as large as they can be), a digit or a scale gets lost, or if a
    zero row is anything but the bias."""
    torch.manual_seed(1)
    weight, bias = quantize_weight(torch.randn(70, 1600), mode), torch.randn(70)
    weight.data[:4] = torch.tensor([127, -127, 127, -127], dtype=torch.int8)[:, None]
    x = torch.randn(2, 4, 1600) * torch.tensor([1, 30, 1e-3, 0])[:, None]
    x[0, 0] = 1
    full = dequantize(weight, torch.float64)
    exact = (rotate(x) if weight.rotated else x).double() @ full.T + bias
    found = integer_linear(x, weight, bias)
    error = (found.double() - exact).norm(dim=-1) / (exact - bias).norm(dim=-1).clamp(min=1e-9)
    assert error.max() < most and torch.equal(found[:, 3], bias.expand(2, -1))
    assert integer_linear(x.bfloat16(), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int8", "int8dyn"])
def test_rows_alone(mode: str) -> None:
    """Fails if a row's result depends on how many rows are computed together, to the last bit: verification would
    choose other tokens than plain decoding."""
    torch.manual_seed(2)
    weight, x = quantize_weight(torch.randn(200, 576), mode), torch.randn(60, 576) * torch.rand(60, 1) * 100
    together = linear(x, weight)
    assert torch.equal(together, torch.cat([linear(row[None], weight) for row in x]))
    assert torch.equal(together, torch.cat([linear(rows, weight) for rows in x.split(7)]))


@pytest.mark.slow
def test_packed_once() -> None:
    """Fails if a weight is packed at every call, or if what was packed outlives the weight."""
    gc.collect()
    before = len(PACKED)
    weight = quantize_weight(torch.randn(32, 64), "int8")
    assert packed(weight) is packed(weight) and len(PACKED) == before + 1
    del weight
    gc.collect()
    assert len(PACKED) == before


def test_what_it_takes() -> None:
    """Fails if int4 or float64 are taken, which the kernels cannot do."""
    int8, int4 = (quantize_weight(torch.randn(32, 256), mode, 128) for mode in ("int8", "int4"))
    x = torch.randn(2, 256)
    assert takes(x, int8) and takes(x.bfloat16(), int8)
    assert not takes(x.double(), int8) and not takes(x, int4) and not takes(x, torch.randn(32, 256))
