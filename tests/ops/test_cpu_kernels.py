"""ops/cpu_kernels.py: the compiled kernels of a CPU against their PyTorch twins in float64, row by row."""
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor

from app.memory import total_bytes
from ops import attention, cpu_kernels, embed_rope
from ops.cpu_integers import PACKED
from ops.linear import linear, linear_torch
from ops.quantized import Quantized, dequantize, pack, rotate
from quant.linear import QuantizedLinear, empty_quantized, in_kernel_order, quantize_weight, rows_of, stack
from tree import build_tree


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    if cpu_kernels.library() is None:
        pytest.skip("this machine has no C++ compiler")
    torch.manual_seed(1)
    with torch.inference_mode():
        yield


INT4 = ["int4, 128", "int4, 64", "int4, 32", "zeros, 128", "zeros, 32, sorted"]


def make_weight(N: int, K: int, mode: str) -> Quantized:
    """Random weights. zeros: with fp16 scales and zeros, as others publish int4; sorted: the columns have an order."""
    if mode not in INT4:
        return quantize_weight(torch.randn(N, K), mode)
    kind, group, *rest = mode.split(", ")
    if kind == "int4":
        return quantize_weight(torch.randn(N, K), "int4", int(group), shrink=(1,))
    weight = empty_quantized(N, K, "int4", int(group), "cpu", zeros=True)
    weight.data.copy_(pack(torch.randint(-8, 8, (N, K))))
    weight.scale[..., 0], weight.scale[..., 1] = torch.rand(weight.scale.shape[:2]) * 1e-3, 5
    weight.scale[0, :, 0], weight.scale[-1, :, 1] = 3e-6, -8  # subnormal in fp16
    return weight._replace(order=torch.randperm(K).int() if rest else None)


def wanted(x: Tensor, weight: Quantized, bias: Tensor | None, norm: tuple | None, residual: Tensor | None, gated: bool
           ) -> Tensor:
    """`linear` in float64, from the weights that the integers stand for."""
    x = x.double()
    if norm:
        x = F.rms_norm(x, x.shape[-1:], norm[0].double(), norm[1])
    full = dequantize(weight, torch.float64)[:, :x.shape[-1]]
    y = (rotate(x).double() if weight.rotated else x) @ full.T + (0 if bias is None else bias)
    if gated:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else residual + y


@pytest.mark.parametrize("mode", ["int8", "int8dyn", *INT4])
@pytest.mark.parametrize("N, K", [(64, 16), (192, 576), (64, 4112)])
def test_linear(mode: str, N: int, K: int) -> None:
    """Fails if a sum overflows (the first weights and rows are as large as they can be), a tile, a column beyond 2,048,
    a scale, an offset or a part of the formula gets lost, a zero row is anything but the bias, or a row's result
    depends on the others, to the last bit: verification would choose other tokens than plain decoding."""
    weight, bias, g = make_weight(N, K, mode), torch.randn(N), torch.rand(K) + 0.5
    weight.data[:4] = torch.tensor([0x77, -0x78, 0x77, -0x78] if mode in INT4 else [127, -127, 127, -127],
                                   dtype=torch.int8)[:, None]
    for rows in (1, 2, 3, 7, 16, 21):
        x = torch.randn(rows, K) * torch.tensor([1, 30, 1e-3])[torch.arange(rows) % 3, None]
        x[0], x[rows // 2] = 1, 0
        residual = torch.randn(rows, N)
        for options in ((None, None, None, False), (bias, None, residual, False), (None, (g, 1e-5), None, True),
                        (bias, (g, 1e-2), residual[:, :N // 2].contiguous(), True)):
            found, exact = linear(x, weight, *options), wanted(x, weight, *options)
            error = (found - exact).norm(dim=-1) / (exact.norm(dim=-1) + 1e-9)
            assert error.max() < 1e-3, (rows, options)
            bias_, norm, rest, gated = options
            alone = [linear(x[i:i + 1], weight, bias_, norm, None if rest is None else rest[i:i + 1], gated)
                     for i in range(rows)]
            assert torch.equal(found, torch.cat(alone)), (rows, options)


@pytest.mark.parametrize("D", [16, 32, 64, 96])
def test_heads(D: int) -> None:
    """Fails if a head is rotated or stored as another one, with int8 weights in one kernel or, as those of 16, after a
    product; or if the product of those of 16 is another kernel's, which would keep the weights a second time."""
    K, T, S = 2, 5, 20
    weight = quantize_weight(torch.randn((8 + 2 * K) * D, 64), "int8")
    x, rope, slots = torch.randn(T, 64), torch.randn(2, T, D // 2).repeat(1, 1, 2), torch.tensor([3, 19, 0, 7, 4])
    plain = linear(x, weight)
    caches = [torch.zeros(2, K, S, D) for _ in range(3)]
    exact = embed_rope.rope_store_torch(plain, rope, slots, caches[0])
    for found, kv in ((linear(x, weight, rope_cache=(rope, slots, caches[1])).view(T, 8, D), caches[1]),
                      (embed_rope.rope_store(plain, rope, slots, caches[2]), caches[2])):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kv, caches[0], rtol=1e-5, atol=1e-5)
    assert weight.data not in PACKED


@pytest.mark.parametrize("mode", ["int8", "int8dyn", *INT4])
def test_kept_once(mode: str) -> None:
    """Fails if a weight is in memory twice once the kernel has read it, or if something that reads the integers
    afterwards reads others: its shape, its values, rows of it, two in one, a file, a move."""
    layer = QuantizedLinear(make_weight(192, 48, mode))
    before = dequantize(layer.weight, torch.float64)
    rows, size = weakref.ref(layer.data.untyped_storage()), total_bytes(layer)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    x = torch.randn(3, 48)
    assert rows() is not None
    y = linear(x, layer.weight)
    assert layer.data.dim() == 4 and total_bytes(layer) == size, "the kernel did not read it"
    gc.collect()
    assert rows() is None
    weight = layer.weight
    assert weight.shape == (192, 256 if mode in INT4 else 48) and torch.equal(linear(x, weight), y)
    assert torch.equal(dequantize(weight, torch.float64), before)
    for part in (slice(64, 128), slice(128, None), slice(3, 67), slice(None, None, 3), torch.tensor([5, 191, 0])):
        assert torch.equal(dequantize(rows_of(weight, part), torch.float64), before[part])
    assert rows_of(weight, slice(64, 128)).data.untyped_storage().data_ptr() == weight.data.untyped_storage().data_ptr()
    below = make_weight(64, 48, mode)._replace(order=weight.order)
    both = stack(weight, below)
    assert torch.equal(dequantize(both, torch.float64), torch.cat((before, dequantize(below, torch.float64))))
    assert (linear_torch(x, weight) - y).norm() < 0.05 * y.norm()
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    assert layer.to("cpu").data.equal(state["data"]) and torch.equal(linear(x, layer.weight), y)


def test_rows_of_two_in_one() -> None:
    """Fails if rows of a weight that was made of two are copied when the kernel reads them: an EAGLE head drafts with
    its lm_head and fc, with both in one and with each."""
    both = in_kernel_order(stack(*(quantize_weight(torch.randn(N, 32), "int8") for N in (128, 64))))
    parts = both, rows_of(both, slice(128)), rows_of(both, slice(128, None))
    x = torch.randn(2, 32)
    y, *rest = (linear(x, part) for part in parts)
    assert torch.equal(y, torch.cat(rest, -1))
    assert total_bytes([part.data for part in parts]) == 192 * 32


@pytest.mark.parametrize("dtype, most", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("T, H, K, D, base", [(1, 9, 3, 64, 150), (7, 4, 4, 16, 0), (70, 6, 2, 48, 33)])
def test_attention(T: int, H: int, K: int, D: int, base: int, dtype: torch.dtype, most: float) -> None:
    """Fails if a row sees another row's slots, the window or the last slot is off by one, or a row's result depends on
    the others. The slots that no row may see hold NaN."""
    parents = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, T)])
    tree, at = build_tree(parents, parents, T), torch.tensor(base)
    q, kv = torch.randn(T, H, D).to(dtype), torch.randn(2, K, 300, D).to(dtype)
    kv[:, :, base + T:] = torch.nan
    finite = kv.double().nan_to_num(0)
    for bits in (tree.ancestors, None):
        for window in (None, 9):
            found = attention.tree_attention(q, kv, at, bits, window)
            exact = attention.tree_attention_torch(q.double(), finite, at, bits, window)
            assert (found.double() - exact).abs().max() < most and found.dtype == dtype
    together = attention.tree_attention(q, kv, at, tree.ancestors)
    for i in range(0, T, 5):
        alone = attention.tree_attention(q[i:i + 1], kv, at, tree.ancestors[i:i + 1])
        assert torch.equal(alone, together[i:i + 1])


def test_tree_equals_text() -> None:
    """Fails if a node's attention differs, in the last bit, from that of the same tokens as a text: then a tie that
    rounding decides could be decided otherwise."""
    q, kv = torch.randn(1, 4, 32), torch.randn(2, 2, 64, 32)
    path = torch.tensor([1 << 0 | 1 << 2 | 1 << 5])  # the node in slot 20 + 5 below those in 20 and 22
    text = kv.clone()
    text[:, :, 21:23] = kv[:, :, [22, 25]]
    in_tree = attention.tree_attention(q, kv, torch.tensor(20), path[None])
    assert torch.equal(in_tree, attention.tree_attention(q, text, torch.tensor(22), torch.tensor([[1]])))


def test_norm() -> None:
    """Fails if the norm differs from PyTorch's by more than rounding."""
    x, g = torch.randn(3, 5, 80), torch.randn(80)
    torch.testing.assert_close(cpu_kernels.rms_norm(x, g, 1e-2), F.rms_norm(x, (80,), g, 1e-2), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_threads() -> None:
    """Fails if a unit is done twice or never where threads share the work, or if their number changes the result."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from ops.linear import linear
from quant.linear import quantize_weight
torch.manual_seed(3)
with torch.inference_mode():
    weight, x = quantize_weight(torch.randn(2048, 64), "int8"), torch.randn(33, 64)
    first = linear(x, weight)
    assert all(torch.equal(linear(x, weight), first) for _ in range(2000))
    print(first.double().sum().item(), first.abs().double().sum().item())"""
    texts = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": threads}, check=True,
                            capture_output=True, text=True).stdout for threads in ("1", "2", "5")}
    assert len(texts) == 1 and texts.pop()


@pytest.mark.parametrize("breaks", ["no compiler", "no folder", "does not compile"])
def test_not_compiled(breaks: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Fails if a machine where the kernels cannot be compiled gets a traceback, or no hint."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if breaks == "no compiler":
        monkeypatch.setattr(cpu_kernels.shutil, "which", lambda name: None)
    elif breaks == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        (tmp_path / "bad.cpp").write_text("int main( {")
        monkeypatch.setattr(cpu_kernels, "SOURCE", tmp_path / "bad.cpp")
    assert cpu_kernels.library.__wrapped__() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "g++ 11" in said
    assert not list(tmp_path.rglob(".*.part"))
