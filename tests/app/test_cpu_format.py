"""The format that a CPU computes in: of the options, and of `make demo`."""
import argparse
import os
import subprocess
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import save_file

from app.answer import setting
from app.options import Engine, placement
from draft import Vanilla
from quant.linear import quantize_linears


@pytest.mark.parametrize("quantize, stored, dtype, expected", [
    ("int8", None, None, torch.float32), (None, "int8", None, torch.float32), (None, "imported", None, torch.float32),
    (None, None, None, torch.bfloat16), ("int8", None, "bfloat16", torch.bfloat16),
    (None, "no file", None, torch.bfloat16)])
@pytest.mark.parametrize("name", ["model.safetensors", "model-int8.safetensors"])
def test_dtype(quantize: str | None, stored: str | None, dtype: str | None, expected: torch.dtype, name: str,
               tmp_path: Path, monkeypatch) -> None:
    """Fails if a CPU that is fast at bfloat16 takes it with integers, of a file too, which then lose their kernels and
    their exactness; or if it does not take it otherwise, or not where it is asked for."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if stored != "no file":
        save_file({"w": torch.zeros(1)}, tmp_path / name, {"mode": stored} if stored else {"format": "pt"})
    checkpoint = tmp_path if name == "model.safetensors" else tmp_path / name
    args = argparse.Namespace(device="cpu", dtype=dtype, quantize=quantize, checkpoint=checkpoint)
    assert placement(args) == ("cpu", expected)


@pytest.mark.parametrize("quantize, dtype, warned", [("int4", "bfloat16", True), ("int4", None, False),
                                                     (None, "bfloat16", False)])
def test_slow_dtype(quantize: str | None, dtype: str | None, warned: bool, tmp_path: Path, capsys) -> None:
    """Fails if nobody is told that the dtype that was asked for leaves quantised weights without kernels."""
    Engine.load(tiny.save_everything(tmp_path), device="cpu", quantize=quantize, dtype=dtype)
    assert ("float32 only" in capsys.readouterr().err) == warned


def test_setting() -> None:
    """Fails if the demo does not say which format it ran in."""
    model = tiny.target()
    engine = Engine(model, Vanilla(), 64)
    assert setting(engine).endswith(f": {str(model.embed.weight.dtype).removeprefix('torch.')}")
    quantize_linears(model, "int8")
    assert ": int8 weights, " in setting(engine)
    other = tiny.target()
    quantize_linears(other, "int4", 64)
    assert ": int4 weights, " in setting(Engine(other, Vanilla(), 64))


@pytest.mark.parametrize("has_gpu", [False, True])
def test_demo(has_gpu: bool, tmp_path: Path) -> None:
    """Fails if the demo leaves int8 out on a CPU, where it is the fastest lossless format, or takes it on a GPU."""
    for tool in ("make", "sh", "env"):
        (tmp_path / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    if has_gpu:
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    commands = subprocess.run(["make", "-n", "-o", "model", "demo"], cwd=ROOT, env=os.environ | {"PATH": str(tmp_path)},
                              check=True, capture_output=True, text=True).stdout
    assert "--eagle2 --compare" in commands and ("--quantize int8" in commands) != has_gpu
