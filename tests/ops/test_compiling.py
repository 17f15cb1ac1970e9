"""ops/compiling.py: kernels are compiled without being launched. The GPU here is made up: kernels are compiled for it,
and never run.

    python -m pytest tests/ops/test_compiling.py
"""
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from triton_tools import not_interpreted

from ops.compiling import compile_kernels
from ops.device import tl, triton

pytestmark = not_interpreted


@triton.jit
def add_kernel(out, count, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, tl.load(out + lane) + count, mask=lane < count)


@triton.jit
def fill_kernel(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), 1.0)


@triton.jit
def wrong_kernel(out, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), no_such_name)  # noqa: F821


class Gpu:
    """What Triton asks of a driver."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[tuple[int, ...]] = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda x, y, z, *_: self.launched.append((x, y, z))

    def load_binary(self, name: str, *_: object) -> tuple[int, ...]:
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": 232448}

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 7

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Gpu]:
    pytest.importorskip("triton")
    made = Gpu()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=made))
    for module in (triton.runtime.jit, triton.compiler.compiler):
        monkeypatch.setattr(module, "driver", SimpleNamespace(active=made))
    yield made
    for kernel in (add_kernel, fill_kernel, wrong_kernel):
        kernel.device_caches.pop(7, None)


def test_compiled_once_and_not_launched(gpu: Gpu, tmp_path) -> None:
    """Fails if a kernel is launched while kernels are collected, if one is left out, compiled twice or not loaded, if
    what no kernel wrote is anything but zeros, or if kernels are no longer launched afterwards."""
    x, found = torch.zeros(64), []

    def job() -> None:
        for count in (16, 48, 3):  # Triton makes one kernel for multiples of 16, another one for other numbers
            add_kernel[2, 1, 1](x, count, N=64)
        add_kernel[1, 1, 1](x, 16, N=32)
        found.append([torch.empty(3), torch.empty_like(x), x.new_empty(2, 2), torch.full((2,), 5)])

    compile_kernels(job, job)
    cubins = sorted(tmp_path.glob("*/*.cubin"))
    assert len(cubins) == 3 and gpu.loaded == ["add_kernel"] * 3 and not gpu.launched
    for empty, like, new, five in found:
        assert not (empty.any() or like.any() or new.any()) and five.tolist() == [5, 5]
    assert (empty.shape, like.shape, new.shape) == ((3,), (64,), (2, 2))
    job()
    assert gpu.launched == [(2, 1, 1)] * 3 + [(1, 1, 1)]
    assert len(gpu.loaded) == 3 and sorted(tmp_path.glob("*/*.cubin")) == cubins


@pytest.mark.slow
def test_one_launcher_at_a_time(gpu: Gpu) -> None:
    """Fails if two threads make the launcher of the same signature together, or if those of different signatures wait
    for one another."""
    making = []
    together = set()

    def make(source, _: object) -> Callable:
        making.append(len(source.signature))
        together.add(tuple(sorted(making)))
        time.sleep(0.2)
        making.remove(len(source.signature))
        return lambda *_: None

    gpu.launcher_cls = make
    x = torch.zeros(64)

    def job() -> None:
        for size in (8, 16, 32, 64):
            add_kernel[1, 1, 1](x, 16, N=size)
            fill_kernel[1, 1, 1](x, N=size)

    compile_kernels(job)
    assert (2, 3) in together and not {(2, 2), (3, 3), (2, 2, 3), (2, 3, 3)} & together


def test_one_parser_at_a_time(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two threads parse kernels at the same time, or if parsing stays changed afterwards."""
    parsing, most = [], []
    parse = triton.JITFunction.parse

    def slow(kernel):
        parsing.append(kernel)
        most.append(len(parsing))
        time.sleep(0.05)
        parsing.remove(kernel)
        return parse(kernel)

    monkeypatch.setattr(triton.JITFunction, "parse", slow)
    x = torch.zeros(64)
    compile_kernels(lambda: add_kernel[1, 1, 1](x, 16, N=8), lambda: fill_kernel[1, 1, 1](x, N=8))
    assert max(most) == 1 and len(most) >= 2 and triton.JITFunction.parse is slow


def test_errors(gpu: Gpu) -> None:
    """Fails if a kernel that cannot be compiled, or an error of a job, is swallowed, or if kernels are no longer
    launched after it."""
    x = torch.zeros(64)
    with pytest.raises(triton.compiler.errors.CompilationError, match="no_such_name"):
        compile_kernels(lambda: wrong_kernel[1, 1, 1](x, N=32))
    with pytest.raises(ZeroDivisionError):
        compile_kernels(lambda: add_kernel[1, 1, 1](x, 16, N=32), lambda: 1 / 0)
    add_kernel[1, 1, 1](x, 16, N=32)
    assert gpu.launched == [(1, 1, 1)]
