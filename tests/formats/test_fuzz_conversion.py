"""Damaged downloads: convert_hf_checkpoint.py makes a folder of them that loads, or says in one line why not.

    python -m pytest tests/formats/test_fuzz_conversion.py
"""
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from damage import damaged_gguf, damaged_json, damaged_safetensors, flipped, fuzz, gguf_fields, refusal
from tiny_sources import save_gguf, save_published

import convert_hf_checkpoint
from model import load_model
from tokenizer import Tokenizer

Convert = Callable[[Path], None]


@pytest.fixture
def convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Convert:
    """Run the command on a source. Returns if it worked and what it wrote loads; ValueError with its line if it refused
    the source, with exit code 2 and without leaving anything that loads. All else fails."""
    def convert(source: Path) -> None:
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", str(source), "--out", str(out)])
        code = 0
        try:
            convert_hf_checkpoint.main()
        except SystemExit as end:
            code = end.code or 0
        except (ValueError, OSError) as error:  # what run_command prints
            code = 2
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        err = capsys.readouterr().err
        files = [path.name for path in out.rglob("*")] if out.exists() else []
        if code == 0:
            for load in (load_model, Tokenizer):
                refused = refusal(load, out)
                assert not refused, f"converted, but {refused}"
            shutil.rmtree(out)
            return
        *progress, line = err.rstrip("\n").split("\n")
        assert code == 2 and line.startswith("error: ") and len(line) > 20, err
        assert not any(text.startswith(("error", "Traceback")) for text in progress), err
        assert "config.json" not in files and "model.safetensors" not in files, files
        raise ValueError(line)
    return convert


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf(kind: str, convert: Convert, tmp_path: Path) -> None:
    """Fails if a field of a GGUF header is trusted: counts, lengths, types, dimensions, offsets, values."""
    path = save_gguf(tmp_path / "model.gguf", kind)
    fields = gguf_fields(path.read_bytes())
    fuzz(path, 100, partial(damaged_gguf, fields=fields), convert, path)


@pytest.mark.slow
def test_gguf_that_is_cut_off(convert: Convert, tmp_path: Path) -> None:
    """Fails if a GGUF file may end early: within its header, between two fields, or within its last tensor."""
    path = save_gguf(tmp_path / "model.gguf", "gpt2")
    data = path.read_bytes()
    fields = gguf_fields(data)
    for end in [0, 1, *(start for start, _ in fields[:70:3] + fields[-60::4]), len(data) - 40]:
        path.write_bytes(data[:end])
        assert refusal(convert, path) != "", end


@pytest.mark.slow
def test_gguf_lengths(convert: Convert, tmp_path: Path) -> None:
    """Fails if a length in a GGUF file may go past its end. gguf's reader would make a list of as many empty items,
    until the memory is full."""
    path = save_gguf(tmp_path / "model.gguf", "llama")
    data = path.read_bytes()
    lengths = [data.index(name) + len(name) + 8 for name in (b"tokenizer.ggml.token_type", b"tokenizer.ggml.scores")]
    for position in lengths:
        assert int.from_bytes(data[position:position + 8], "little") == 260
        for length in (2**24, 2**40, 2**64 - 1):
            path.write_bytes(data[:position] + struct.pack("<Q", length) + data[position + 8:])
            assert refusal(convert, path) != "", length


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_published_folder(suffix: str, convert: Convert, tmp_path: Path) -> None:
    """Fails if a file of a Hugging Face folder is not refused cleanly: index, shard, config or tokenizer."""
    folder = save_published(tmp_path / "source", suffix)
    index, = folder.glob("*.index.json")
    shard = min(folder.glob(f"*.{suffix}"))
    fuzz(shard, 50, damaged_safetensors if suffix == "safetensors" else flipped, convert, folder)
    fuzz(index, 40, damaged_json, convert, folder)
    if suffix == "safetensors":
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            fuzz(folder / name, 25, damaged_json, convert, folder)
