"""Quantised model files: those of older versions load, and each weight of a file may be of another kind.

    python -m pytest tests/quant/test_stored.py

tests/quant/stored/ holds a model of one layer in each mode, as quantize.py wrote it on 2026-11-29, before a file could
hold weights of several kinds, and the logits that this version computed in float64.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SHAPE, logits, save_target, target
from torch import Tensor

from app.memory import stored_model, total_bytes
from formats.weights import FORMAT
from model import load_model
from ops.quantized import Quantized, dequantize, pack
from quant.linear import IMPORTED, QuantizedLinear, is_quantized, quantize_weight

STORED = Path(__file__).parent / "stored"
IDS = [1, 5, 9, 2]


@pytest.mark.parametrize("mode", ["int8", "int8dyn", "int4"])
def test_older_files_load(mode: str) -> None:
    """Fails if a file that an older version wrote is refused, or means another model now."""
    model = load_model(STORED / f"model-{mode}.safetensors", "cpu", torch.float64)
    wanted = torch.tensor(json.loads((STORED / "logits.json").read_text())[mode], dtype=torch.float64)
    torch.testing.assert_close(logits(model, IDS)[-1], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("mode", "least"), [("int8", 0), ("int4", 8)])
def test_the_bits_on_disk(mode: str, least: int) -> None:
    """Fails if the bits of a file no longer mean what ops/quantized.py says: they are read here by hand."""
    tensors = load_file(STORED / f"model-{mode}.safetensors")
    model = load_model(STORED / f"model-{mode}.safetensors", "cpu", torch.float32)
    data, scale = tensors["layers.0.w2.data"], tensors["layers.0.w2.scale"].float()
    wanted = torch.empty(16, 16)
    for n in range(16):
        for k in range(16):
            if mode == "int8":
                wanted[n, k] = data[n, k] * scale[n]
            else:
                q = (int(data[n, k]) & 15 ^ 8) - 8  # sign of four bits
                wanted[n, k] = 16 * q * scale[k // 64, n, 0] + scale[k // 64, n, 1]
    assert dequantize(model.layers[0].w2.weight, torch.float32)[:, :16].equal(wanted)


def save_mixed(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint whose linears are of many kinds, and what its weights are, by name."""
    model = target(3, torch.float32, num_hidden_layers=2)
    tensors = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(32, generator=generator).int()
    kinds = {"layers.0.wqkv": ("int4", 32, True, order), "layers.0.wo": ("int4", 64, False, None),
             "layers.0.w13": ("int8", 0, False, None), "layers.1.w13": ("int4", 128, True, None),
             "layers.1.w2": ("int4", 32, False, None), "layers.1.wqkv": ("int8", 0, False, None)}
    wanted = {}
    for name, (mode, group, zeros, order) in kinds.items():
        w = tensors.pop(f"{name}.weight")
        if zeros:
            scale = torch.rand(-(-w.shape[1] // 256) * 256 // group, len(w), 2, generator=generator)
            scale[..., 1] = torch.randint(-8, 8, scale.shape[:2], generator=generator)
            q = torch.randint(-8, 8, w.shape, generator=generator)
            weight = Quantized(pack(q), scale.half(), group, 2, False, order)
        else:
            weight = quantize_weight(w, mode, group)
        parts = {"data": weight.data, "scale": weight.scale, "order": weight.order}
        tensors |= {f"{name}.{part}": t for part, t in parts.items() if t is not None}
        wanted[name] = dequantize(weight, torch.float32)[:, :w.shape[1]]
    save_target(model, folder)
    save_file({name: t if name.endswith((".data", ".scale", ".order")) else t.to(dtype)
               for name, t in tensors.items()}, folder / "model.safetensors", {"format": FORMAT, "mode": IMPORTED})
    return folder, wanted


def test_each_weight_has_its_own_kind(tmp_path: Path) -> None:
    """Fails if a weight is read as another kind than its tensors say, or one that is not quantised changes. The logits
    are those of the plain model with the same weights."""
    folder, wanted = save_mixed(tmp_path)
    model = load_model(folder, "cpu", torch.float32)
    plain = target(3, torch.float32, num_hidden_layers=2)
    assert is_quantized(model) and not is_quantized(plain)
    for name, w in wanted.items():
        assert dequantize(model.get_submodule(name).weight, torch.float32)[:, :w.shape[1]].equal(w)
        plain.get_submodule(name).weight.data = w
    for name in ("lm_head", "layers.0.w2", "layers.1.wo"):
        assert model.get_submodule(name).weight.equal(plain.get_submodule(name).weight)
    # A CPU's integer kernels round x to 14 bits
    torch.testing.assert_close(logits(model, IDS), logits(plain, IDS), rtol=2e-2, atol=2e-2)


def test_its_memory_is_known(tmp_path: Path) -> None:
    """Fails if --memory takes such a file for one mode."""
    folder, _ = save_mixed(tmp_path)
    held = total_bytes(load_model(folder, "cpu", torch.bfloat16))
    assert total_bytes(stored_model(folder / "model.safetensors", torch.bfloat16)) == held


@pytest.mark.parametrize(("name", "change", "says"), [
    ("layers.0.wqkv.order", lambda t: t.flip(0).clamp(max=5), "layers.0.wqkv.order is no order of 32 columns"),
    ("layers.0.w13.order", lambda t: torch.arange(32, dtype=torch.int32), "layers.0.w13.order: only int4 has one"),
    ("layers.0.wqkv.order", lambda t: t[:9].contiguous(), "layers.0.wqkv.order is no order of 32 columns"),
    ("layers.0.wqkv.scale", lambda t: t[:3].contiguous(), "layers.0.wqkv.scale is"),
    ("layers.0.wqkv.scale", lambda t: t.float(), "layers.0.wqkv.scale is"),
    ("layers.0.w13.scale", lambda t: None, "lacks layers.0.w13.scale"),
    ("layers.1.wo.weight", lambda t: None, "lacks layers.1.wo.weight"),
    ("layers.1.w2.data", lambda t: t[:, :100].contiguous(), "layers.1.w2.data is"),
    ("layers.0.wo.data", lambda t: None, "lacks layers.0.wo.weight"),
])
def test_damaged_files_are_refused(name: str, change, says: str, tmp_path: Path) -> None:
    """Fails if a file with a damaged tensor loads, or the error does not name it."""
    folder, _ = save_mixed(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(name, None))
    tensors |= {} if changed is None else {name: changed}
    save_file(tensors, file, {"format": FORMAT, "mode": IMPORTED})
    with pytest.raises(ValueError, match=says) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_mode_is_not_asked_of_it(tmp_path: Path) -> None:
    """Fails if quantised weights are quantised again."""
    folder, _ = save_mixed(tmp_path)
    with pytest.raises(ValueError, match="for int8 convert the unquantised model"):
        load_model(folder, quantize="int8")


def test_int8dyn_is_the_files_mode(tmp_path: Path) -> None:
    """Fails if the lm_head of an int8dyn file is read as rotated, or its layers as not."""
    shutil.copytree(STORED, tmp_path / "stored")
    model = load_model(tmp_path / "stored/model-int8dyn.safetensors")
    hows = {name: module.how for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert hows.pop("lm_head") == (0, 2, False) and set(hows.values()) == {(0, 1, True)}
    assert SHAPE["num_hidden_layers"] == 2 and len(hows) == 4
