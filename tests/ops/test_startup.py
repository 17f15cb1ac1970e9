"""ops/startup.py: which part of a start a second belongs to.

    python -m pytest tests/ops/test_startup.py
"""
import ctypes
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from app import command
from ops import startup
from ops.startup import Startup, end_of_imports, part, parts_so_far


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch):
    """Lets seconds pass on the clock of a process that has just begun."""
    now = [100.0]
    monkeypatch.setattr(startup, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(startup, "STARTUP", Startup())

    def tick(seconds: float) -> None:
        now[0] += seconds
    return tick


def test_parts(tick) -> None:
    """Fails if a second is counted twice or not at all, if a part within another one is taken out of it, or if time
    after an error still belongs to the part that failed."""
    captured = part("CUDA graphs")(tick)
    tick(3)
    end_of_imports()
    tick(0.5)
    with part("model"):
        tick(1)
    captured(0.25)
    with part("tree size"):
        tick(2)
        captured(4)
    with pytest.raises(ValueError), part("tokenizer"):
        tick(0.125)
        raise ValueError
    captured(0.25)
    tick(1)
    expected = {"imports": 3, "rest": 1.5, "model": 1, "CUDA graphs": 0.5, "tree size": 6, "tokenizer": 0.125}
    assert parts_so_far() == parts_so_far() == expected
    with part("model"):
        tick(1)
        assert parts_so_far() == expected | {"model": 2}
        tick(1)
    assert parts_so_far() == expected | {"model": 3}


class Driver:
    """libcuda.so.1, of which one function may fail."""

    def __init__(self, failing: str | None) -> None:
        self.failing, self.called = failing, []

    def __getattr__(self, name: str):
        return lambda *_: self.called.append(name) or (100 if name == self.failing else 0)


@pytest.mark.parametrize("failing, calls", [
    (None, 3), ("cuInit", 1), ("cuDeviceGet", 2), ("cuDevicePrimaryCtxRetain", 3), ("checksum", 3), ("CDLL", 0)])
def test_waking_a_gpu(failing: str | None, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a context is asked for of a driver that does not work, if Triton is imported where there is none, or if
    the threads say something that torch and Triton will say."""
    driver, sums, waiting = Driver(failing), [], []

    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if failing == "CDLL":
            raise OSError("no such file")
        return driver

    def checksum() -> None:
        sums.append(1)
        if failing == "checksum":
            raise RuntimeError("broken")

    class Thread:
        def __init__(self, target: Callable[[], None], daemon: bool) -> None:
            assert daemon  # the end of the process does not wait for it
            self.start = lambda: waiting.append(target)

    monkeypatch.setattr(startup, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": load}))
    monkeypatch.setattr(startup, "threading", SimpleNamespace(Thread=Thread))
    monkeypatch.setitem(sys.modules, "triton.runtime.cache", SimpleNamespace(triton_key=checksum))
    startup.wake_gpu()
    assert not driver.called and not sums
    for work in waiting:
        work()
    assert driver.called == ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"][:calls]
    assert len(sums) == (failing != "CDLL")


@pytest.mark.parametrize("words, wakes", [
    (("--prompt", "x"), True), (("--device", "cuda"), True), (("--device", "cpu"), False), (("--device=cpu",), False)])
def test_a_cpu_wakes_no_gpu(words: tuple, wakes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --device cpu takes memory of a GPU, or if without it nothing is begun while torch is imported."""
    woken = []
    monkeypatch.setattr(command, "wake_gpu", lambda: woken.append(True))
    monkeypatch.setattr(command, "watch_for_ctrl_c", lambda: None)
    monkeypatch.setattr(command.gc, "disable", lambda: None)
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])
    command.before_imports()
    assert not woken
    command.before_imports(gpu=True)
    assert bool(woken) == wakes
