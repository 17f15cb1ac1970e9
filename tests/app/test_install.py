"""app/install.py: a head is installed only after it was asked, and what its files leave open is measured or asked for.
"""
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from eagle3_published import write
from helpers import tiny_checkpoint
from safetensors.torch import safe_open, save_file

from app import install
from drafters.eagle3 import Eagle3Head
from drafters.head_check import EXPECTED, Variant
from formats.config import Config
from formats.eagle3 import open_eagle3
from formats.weights import FORMAT


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A checkpoint of a target of 8 layers, with a tokenizer and a chat template."""
    folder = tiny_checkpoint(tmp_path / "target")
    model = tiny.target(3, torch.float32, vocab_size=300, num_hidden_layers=8)
    tiny.save_target(model, folder)
    shutil.rmtree(folder / "eagle3")
    return folder


@pytest.mark.slow
def test_guesses_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a head that guesses badly is installed without a warning, or a good one with one."""
    folder = tiny_checkpoint(tmp_path / "x")
    model, _ = tiny.pair(4, 0.03, torch.float32, vocab_size=300)
    good, bad = folder / "eagle", tiny.save_head(tiny.head(model), tmp_path / "bad")
    for head, is_bad in ((good.rename(tmp_path / "good"), False), (bad, True)):
        install.add_head(head, folder)
        said = capsys.readouterr().err
        assert "first, second and third guesses" in said and ("probably another model's" in said) == is_bad
        assert (folder / "eagle/model.safetensors").read_bytes() == (head / "model.safetensors").read_bytes()


@pytest.mark.parametrize("device, stored, expected", [
    ("cpu", False, (torch.float32, "int8")), ("cuda", False, (torch.bfloat16, None)),
    ("cpu", True, (torch.float32, None))])
def test_format(device: str, stored: bool, expected: tuple, target: Path, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a target on a CPU is not run in int8, or in the integers that it is stored in, and in fp32, for which it
    has the fast kernels; or if one on a GPU is."""
    if stored:
        with safe_open(target / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors, target / "model.safetensors", {"format": FORMAT, "mode": "imported"})
    asked = []

    def load_model(path: Path, device: str, dtype: torch.dtype, mode: str | None) -> None:
        asked.append((path, device, dtype, mode))
        raise ValueError("loaded")

    monkeypatch.setattr(install, "placement", lambda args: (device, torch.bfloat16))
    monkeypatch.setattr(install, "free_bytes", lambda device: 10**9)
    monkeypatch.setattr(install, "load_model", load_model)
    write(tmp_path / "head", "speculators", Config.load(target))
    with pytest.raises(ValueError, match="loaded"):
        install.add_head(tmp_path / "head", target)
    assert asked == [(target, device, *expected)]


def test_later_guesses_are_harder(capsys: pytest.CaptureFixture) -> None:
    """Fails if a head is warned of for its third guess, or not for its first."""
    head = tiny.head(tiny.target())
    for shares, warned in (([0.9 * EXPECTED, 0.1, 0.01], False), ([0.3 * EXPECTED, 0.5, 0.5], True)):
        install.warn(Path("head"), head, shares)
        assert ("it is probably" in capsys.readouterr().err) == warned


def test_a_head_in_another_file(tmp_path: Path) -> None:
    """Fails if the quantised file of an older head stays beside a new one whose file is no model.safetensors."""
    (tmp_path / "model-int8.safetensors").touch()
    with install.staged(tmp_path, tmp_path) as part:
        (part / "pytorch_model.bin").touch()
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_memory_for_measuring(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a target is run that fits without its activations alone: the machine would be out of memory."""
    size = install.total_bytes(install.stored_model(target / "model.safetensors", torch.float32, None))
    for share, fits in ((1.2, False), (1.4, True)):
        monkeypatch.setattr(install, "free_bytes", lambda device, share=share: share * size)
        assert (install.why_not_measured(target, "cpu", torch.float32, None) is None) == fits


@pytest.mark.slow
def test_what_is_open_is_measured(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    """Fails if what was measured is not written beside the head, if it is not what decides when the head is loaded, or
    if a close call decides."""
    head, cfg = tmp_path / "head", Config.load(target)
    wanted = write(head, "specforge", cfg, taps=(2, 3, 5), theta=1e6)
    assert wanted.doubts.keys() == {"taps", "rope_theta"}
    tried = []

    def compare(head: Eagle3Head, doubts: dict, *_) -> list[Variant]:
        tried.append(doubts)
        many = torch.arange(200)
        return [Variant({"taps": (2, 3, 5), "rope_theta": 1e4}, [many < 140] * 3),
                Variant({"taps": (3, 4, 6), "rope_theta": 1e4}, [many < second] * 3)]

    monkeypatch.setattr(install, "compare", compare)
    second = 139
    with pytest.raises(ValueError, match="do not tell these apart: choose one of the first 2 lines.*measured.json"):
        install.add_head(head, target)
    assert not (target / "eagle3").exists()
    second = 100
    install.add_head(head, target)
    assert tried[0] == wanted.doubts and "70.0%" in capsys.readouterr().err
    assert json.loads((target / "eagle3/measured.json").read_text()) == {"taps": [2, 3, 5], "rope_theta": 1e4}
    (head / "measured.json").write_text('{"norm_before_residual": true}')  # what is known stays known
    install.add_head(head, target)
    assert json.loads((target / "eagle3/measured.json").read_text())["norm_before_residual"] is True
    found = open_eagle3(target / "eagle3", cfg)
    assert found.config.taps == (2, 3, 5) and found.config.layer.rope_theta == 1e4 and not found.doubts


@pytest.mark.slow
def test_it_is_really_measured(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if the whole way, without a stand-in, ends in anything but a table and either fields or one line that asks:
    a random head knows nothing, so nothing is clear."""
    write(tmp_path / "head", "specforge", Config.load(target), taps=(2, 3, 5))
    with pytest.raises(ValueError, match="do not tell these apart"):
        install.add_head(tmp_path / "head", target)
    assert capsys.readouterr().err.count("taps [") == 2


def test_where_nothing_can_be_measured(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    """Fails if a head whose files leave something open is guessed at without a tokenizer or enough memory; or if a head
    that leaves nothing open is refused there."""
    cfg = Config.load(target)
    write(tmp_path / "open", "specforge", cfg, theta=1e6)
    write(tmp_path / "plain", "speculators", cfg)
    monkeypatch.setattr(install, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match='leave open what rope_theta is.*GB are free.*measured.json beside them, with'):
        install.add_head(tmp_path / "open", target)
    install.add_head(tmp_path / "plain", target)
    assert "not tried out (the target needs" in capsys.readouterr().err
    (target / "tokenizer.json").unlink()
    install.add_head(tmp_path / "plain", target)
    assert "has no tokenizer" in capsys.readouterr().err
