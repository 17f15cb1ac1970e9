"""formats/weights.py: what is read from a file, and what of it stays in memory."""
import gc
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file

from formats.config import Config
from formats.weights import read_tensors
from model import Llama, load_model
from ops.quantized import Quantized
from quant.linear import quantize_weight as original


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    found, is_file = 0, False
    for line in lines:
        if not line.partition(" ")[0].endswith(":"):  # a mapping begins: addresses, ..., path
            is_file = line.endswith(str(file))
        elif is_file and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_tensors(tmp_path: Path) -> None:
    """Fails if a tensor of any dtype, an empty one, one without dimensions or one at an odd place is read as another,
    or if two share memory."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16,
              torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn)
    wanted = {f"t{i}": (100 * torch.rand(3, i)).to(dtype) for i, dtype in enumerate(dtypes)}
    wanted |= {"scalar": torch.tensor(2.5), "odd": torch.ones(3, dtype=torch.uint8), "after": torch.ones(5)}
    save_file(wanted, tmp_path / "x.safetensors", {"mode": "none"})
    found, metadata = read_tensors(tmp_path / "x.safetensors")
    assert metadata == {"mode": "none"} and found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8) if tensor.dim() else found[name],
                           tensor.view(torch.uint8) if tensor.dim() else tensor), name
    found["t2"][0] += 1  # the file, and what others read of it, stays as it is
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")[0]["t2"], wanted["t2"])


@pytest.mark.slow
def test_pages_go_with_their_tensor(tmp_path: Path) -> None:
    """Fails if pages of tensors that are gone stay in memory while another tensor of the file lives, or if giving them
    back changes that one."""
    file = tmp_path / "x.safetensors"
    save_file({name: torch.full((1000, 1001), float(i)) for i, name in enumerate("abcd")}, file)
    size = file.stat().st_size
    tensors = read_tensors(file)[0]
    assert sum(t.sum().item() for t in tensors.values()) == 6 * 1_001_000
    assert size / 2 < resident(file) <= size + 2**16
    part = tensors.pop("b")[500:]
    tensors.clear()
    gc.collect()
    assert resident(file) <= part.untyped_storage().nbytes() + 2**16
    assert torch.equal(part, torch.ones(500, 1001))
    del part
    gc.collect()
    assert resident(file) == 0


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_loaded_file_is_not_resident(quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the weights of a file that were converted or quantised stay in memory, afterwards or until the last one
    is done."""
    cfg = Config.from_dict(tiny.SHAPE | {"vocab_size": 3000, "hidden_size": 256, "intermediate_size": 1024,
                                         "num_hidden_layers": 8})
    model = Llama(cfg)
    tiny.randomise(model, 0, torch.bfloat16)
    file = tiny.save_target(model, tmp_path / "x") / "model.safetensors"
    size, seen = file.stat().st_size, []

    def quantize_weight(*args: object, **options: object) -> Quantized:
        weight = original(*args, **options)
        seen.append(resident(file))
        return weight

    monkeypatch.setattr("quant.linear.quantize_weight", quantize_weight)
    model = load_model(file.parent, "cpu", torch.float32, quantize)
    gc.collect()
    assert model.norm.weight.dtype == torch.float32 and size > 15e6
    assert resident(file) < size / 20
    assert len(seen) == (33 if quantize else 0) and max(seen, default=0) < size / 4
