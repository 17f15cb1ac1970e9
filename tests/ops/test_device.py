"""ops/device.py: a GPU that cannot run the kernels is refused in one line, before anything is loaded.

    python -m pytest tests/ops/test_device.py
"""
import runpy
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import ROOT
from triton_tools import assert_fits, compile_ahead, not_interpreted, run_without_triton

from model import load_model
from ops import device

TOO_OLD = ("The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
           "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose GPU would do. Patch what is wrong with it."""
    device.triton_problem.cache_clear()
    for name, value in (("is_available", True), ("get_device_capability", (8, 6)), ("get_device_name", "A GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(device, "TRITON_ERROR", None)
    monkeypatch.setattr(device, "torch", SimpleNamespace(**vars(torch) | {"zeros": lambda *_, **__: torch.empty(32)}))
    monkeypatch.setattr(device, "probe_kernel", {(1,): lambda *_, **__: None})
    yield monkeypatch
    device.triton_problem.cache_clear()


def absent(error: Exception):
    def init() -> None:
        raise error
    return {"is_available": lambda: False, "init": init}


def failing(*_: object, **__: object) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")


@pytest.mark.parametrize("patches, asked, words", [
    ({}, (None, "cuda", "cpu"), None),
    ({"cuda": {"get_device_capability": lambda *_: (7, 5)}}, (None, "cuda"), "compute capability 7.5"),
    ({"cuda": absent(RuntimeError(TOO_OLD))}, (None, "cuda"), "driver on your system is too old (found version "
        "12020))"),
    ({"cuda": absent(RuntimeError("No CUDA GPUs are available"))}, ("cuda",), "No CUDA GPUs"),
    ({"cuda": absent(RuntimeError("Found no NVIDIA driver on your system. Please check"))}, ("cuda",), "no NVIDIA "
        "driver"),
    ({"cuda": absent(AssertionError("x")), "version": {"cuda": None}}, ("cuda",), "built for CPUs only"),
    ({"version": {"hip": "6.4"}}, (None, "cuda"), "AMD"),
    ({"own": {"TRITON_ERROR": ImportError("No module named 'triton'")}}, (None, "cuda"), "ImportError: No module "
        "named"),
    ({"own": {"TRITON_ERROR": OSError("libtriton.so: no such\nfile")}}, (None, "cuda"), "libtriton.so: no such file"),
    ({"own": {"probe_kernel": {(1,): failing}}}, (None, "cuda"), "C compiler"),
    ({"own": {"probe_kernel": failing}}, (None, "cuda"), "cannot compile a kernel"),  # as without triton.jit: no [grid]
])
def test_gpu_problem(patches: dict, asked: tuple, words: str | None, gpu: pytest.MonkeyPatch) -> None:
    """Fails if an unfit GPU, driver or Triton is not refused in one line that names it and the way out, if a machine
    without a GPU is refused, or if --device cpu is."""
    for owner, changes in patches.items():
        for name, value in changes.items():
            gpu.setattr({"cuda": torch.cuda, "version": torch.version, "own": device}[owner], name, value)
    for one in (None, "cuda", "cpu"):
        problem = device.gpu_problem(one)
        if words is None or one not in asked:
            assert problem is None
        else:
            assert words in problem and "--device cpu" in problem and "\n" not in problem and "URL" not in problem


@pytest.mark.parametrize("found, tilings_of", [
    ((8, 6), (8, 6)), ((9, 0), (9, 0)), ((10, 0), (10, 0)), ((12, 0), (8, 9)), ((12, 1), (8, 9))])
def test_limits(found: tuple[int, int], tilings_of: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if desktop Blackwell, with 99 KB of shared memory, gets the tilings of Hopper, which need 227."""
    props = SimpleNamespace(multi_processor_count=170, major=found[0], minor=found[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: props)
    device.device_limits.cache_clear()
    try:
        assert device.device_limits(torch.device("cuda")) == (170, tilings_of)
    finally:
        device.device_limits.cache_clear()


@not_interpreted
def test_probe_compiles() -> None:
    """Fails if the kernel that tries out Triton does not compile itself."""
    for arch in (80, 90):
        assert_fits(compile_ahead(device.probe_kernel, arch, {"out": "*i32"}, {"PDL": arch >= 90}, warps=4), arch)


def test_said_at_the_start(gpu: pytest.MonkeyPatch, call, tmp_path: Path) -> None:
    """Fails if generate.py does not say it before it loads anything: in one line, with exit code 2."""
    folder = tiny.save_everything(tmp_path / "x")
    gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    gpu.setattr("app.options.load_model", lambda *_: pytest.fail("the model is loaded"))
    for more in ((), ("--device", "cuda"), ("--memory",), ("--eagle2",)):
        words = more if "--memory" in more else ("--prompt", "x", *more)
        code, out, err = call("--checkpoint", folder, *words)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: A GPU has compute capability 7.5")


def test_every_command_loads_a_model(gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if bench.py, train.py or quantize.py, which load the model themselves, get further than that."""
    folder = tiny.save_target(tiny.target(dtype=torch.float32), tmp_path / "x")
    gpu.setattr(device, "TRITON_ERROR", ImportError("none"))
    for where in ("cuda", "cuda:0", torch.device("cuda")):
        with pytest.raises(ValueError, match="cannot be imported"):
            load_model(folder, where)


@pytest.mark.slow
def test_cpus_need_no_triton() -> None:
    """Fails if ops/ cannot be imported without Triton, which PyTorch for CPUs does not bring, or cannot be used."""
    out = run_without_triton("import torch, ops.tree; from ops import attention; from ops.linear import linear; "
                             "q = torch.ones(1, 1, 4); "
                             "print(attention.tree_attention(q, torch.ones(2, 1, 8, 4), torch.tensor(3)).tolist(), "
                             "linear(torch.ones(1, 16), torch.ones(3, 16)).tolist())")
    assert out.strip() == "[[1.0, 1.0, 1.0, 1.0]] [[16.0, 16.0, 16.0]]"


class Broken(MetaPathFinder):
    """Makes `import triton` raise this error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_: object) -> None:
        if name == "triton":
            raise self.error


@pytest.mark.parametrize("error", [ImportError("none"), OSError("libcuda"), AttributeError("old"), RuntimeError("bad")])
def test_a_broken_triton_stops_no_cpu(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a Triton that cannot be imported stops a run on the CPU, or if the reason is lost."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(error), *sys.meta_path])
    found = runpy.run_path(str(ROOT / "ops/device.py"))
    assert found["TRITON_ERROR"] is error and found["gpu_problem"]("cpu") is None
