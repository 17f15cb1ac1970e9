"""quant/: weights whose integers are known beforehand must be found exactly, and calibration must solve what it says.

    python -m pytest tests/quant/test_integers.py
"""
import pytest
import torch
from torch import Tensor

from ops.quantized import dequantize, unpack
from quant.calibration import corrected_weight
from quant.int4 import SHRINK, column_importance, cover_range, gptq, nearest_integers
from quant.linear import GROUPS, MODES, QuantizedLinear, mode_of, quantize_linears, quantize_weight


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_range_is_covered() -> None:
    """Fails if the 16 values do not reach from the lowest weight to the highest one: their middle lies half a step
    below the offset, since they are -8 to 7 steps from it."""
    low, high = torch.tensor([-3.0, 0.0, -5.0]), torch.tensor([12.0, 30.0, 1.0])
    for fraction in (1.0, 0.5):
        scale, offset = cover_range(low, high, fraction)
        middle, reach = (low + high) / 2, fraction * (high - low) / 2
        assert torch.allclose(offset - 8 * scale, middle - reach) and torch.allclose(offset + 7 * scale, middle + reach)
    scale, offset = cover_range(torch.zeros(1), torch.zeros(1), 1.0)
    assert 0 < scale < 1e-20 and offset.abs() < 1e-20


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shrink", [(1,), SHRINK])
def test_int4_finds_the_integers(shrink: tuple[float, ...], group: int) -> None:
    """Fails if int4 is half a step off, clips where nothing need be clipped, or rounds away from the nearest value: of
    weights that are 16 neighbouring multiples of a step, 0 among them, no one may change. With inputs too."""
    lowest = torch.arange(-15, 1)[:, None]  # a row for each place of 0 among the 16 multiples
    q = torch.arange(2 * group) * 7 % 16
    steps = 2.0 ** torch.tensor([-6, -2]).repeat_interleave(group)  # of the two groups
    w = (lowest + q) * steps
    hessian = torch.eye(2 * group) + 0.1
    for inputs in (None, hessian):
        weight = quantize_weight(w, "int4", group, inputs, shrink)
        assert torch.equal(dequantize(weight, torch.float32)[:, :2 * group], w)
        assert torch.equal(unpack(weight)[:, :2 * group], (q - 8).to(torch.int8).expand(16, -1))


def test_nearest() -> None:
    """Fails if a value within the range is off by more than half a step, or one beyond it is not clipped to its end."""
    w = torch.linspace(-9, 8, 128)[None] * 0.25 + 1
    scale, offset = torch.full((1, 1), 0.25), torch.ones(1, 1)
    q = nearest_integers(w, scale, offset, 128)
    inside = (w - 1).abs() / 0.25 < 7.5
    assert ((q * 0.25 + 1 - w).abs() <= 0.125 + 1e-6)[inside].all()
    assert (q.amin(), q.amax()) == (-8, 7) and q[0, 0] == -8 and q[0, -1] == 7


def test_int8_uses_the_whole_range() -> None:
    """Fails if the largest weight of a row is not 127 steps, or if rows share a step."""
    w = random(5, 64) * torch.arange(1, 6)[:, None]
    weight = quantize_weight(w, "int8")
    assert (weight.data.abs().amax(1) == 127).all() and torch.allclose(weight.scale * 127, w.abs().amax(1))
    assert ((weight.data * weight.scale[:, None] - w).abs() <= 0.5001 * weight.scale[:, None]).all()
    assert not quantize_weight(torch.zeros(2, 64), "int8").data.any()


@pytest.mark.parametrize("mode", ["int8", "int8dyn"])
def test_blocks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the number of rows that are quantised at a time changes an integer or a scale, loses the rows of the
    last block, or if the weights themselves are changed."""
    w = torch.randn(77, 64)
    whole, kept = quantize_weight(w, mode), w.clone()
    monkeypatch.setattr("quant.linear.CACHED", 10 * 64)
    parts = quantize_weight(w, mode)
    assert torch.equal(parts.data, whole.data) and torch.equal(parts.scale, whole.scale) and torch.equal(w, kept)


def test_importance() -> None:
    """Fails if an input that was always 0 counts as nothing, which divides by zero, or as much as the others."""
    hessian = torch.diag(torch.tensor([4.0, 0.0, 0.25, 9.0])) + torch.tensor([[0.0] * 3 + [1.0]] + [[0.0] * 4] * 3)
    assert column_importance(hessian).tolist() == [4.0, 0.25, 0.25, 9.0]


def test_gptq_makes_up_for_errors() -> None:
    """Fails if an error is not carried to the columns that can undo it: of two equal inputs, what one rounds up the
    other one rounds down, and uncorrelated inputs get the nearest integers."""
    w = torch.full((1, 64), 0.4)
    scale, offset = torch.ones(1, 1), torch.zeros(1, 1)
    same = torch.ones(64, 64) + 1e-3 * torch.eye(64)
    assert gptq(w, scale, offset, 64, same).sum() == pytest.approx(0.4 * 64, abs=0.7)
    w = 3 * random(3, 64)
    scale, offset = torch.ones(1, 3), torch.zeros(1, 3)
    alone = torch.diag(torch.arange(1.0, 65))
    assert torch.equal(gptq(w, scale, offset, 64, alone), nearest_integers(w, scale, offset, 64))


def test_corrected_weight() -> None:
    """Fails if the calibrated weight is not the least-squares answer: where the quantised layers before turned the
    inputs b into a, it maps a to what w made of b, less what the hidden states lack."""
    w = random(6, 8)
    b = [random(2, 40, 8, seed=i) for i in (1, 2)]
    mixing = torch.eye(8) + 0.2 * random(8, 8, seed=3)
    inputs = [(each @ mixing, each) for each in b]
    found, hessian = corrected_weight(w, inputs, None, 1.0, 0.0)
    assert torch.allclose(found @ mixing.T, w, atol=1e-4)
    a = torch.cat([each.flatten(0, 1) for each, _ in inputs])
    assert torch.allclose(hessian, a.T @ a / len(a), atol=1e-5)
    half, _ = corrected_weight(w, inputs, None, 0.5, 0.0)
    assert torch.allclose(half, (found + w) / 2, atol=1e-5)
    lost = random(6, 8, seed=4)  # x = y - a lost.T: the weight must add it back
    hidden = [(each @ -lost.T, torch.zeros(2, 40, 6)) for each, _ in inputs]
    with_hidden, _ = corrected_weight(w, inputs, hidden, 1.0, 0.0)
    assert torch.allclose(with_hidden, found + lost, atol=1e-4)
    damped, _ = corrected_weight(w, inputs, None, 1.0, 100.0)
    assert (damped - w).norm() < 0.1 * (found - w).norm()


def test_which_mode() -> None:
    """Fails if an lm_head gets fewer than 8 bits, an unknown mode or group is taken, or a bias is lost."""
    assert [mode_of("lm_head", mode) for mode in MODES] == ["int8"] * 3
    assert [mode_of("wqkv", mode) for mode in MODES] == ["int8", "int8dyn", "int4"]
    module = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(64, 8), "w2": torch.nn.Linear(64, 8)})
    biases = {name: linear.bias.clone() for name, linear in module.items()}
    quantize_linears(module, "int4", 64)
    assert all(isinstance(linear, QuantizedLinear) for linear in module.values())
    assert all(torch.equal(linear.bias, biases[name]) for name, linear in module.items())
    assert (module["lm_head"].how, module["w2"].how) == ((0, 2, False), (64, 2, False))
    for mode, group in (("int5", 128), ("int4", 16)):
        with pytest.raises(ValueError, match="int"):
            quantize_weight(torch.zeros(4, 64), mode, group)
