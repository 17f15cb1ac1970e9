"""Where the seconds go between the first line of a command and its first token.

    with part("model"): ...

Python's and torch's imports are the first part, so this file is imported before torch, and imports nothing but the
standard library. generate.py prints the parts, and `benchmarks.cycle --startup` makes a table of them.
"""
import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial

REST = "rest"


class Startup:
    """The seconds of each part so far. One part is running at a time: the first is the imports."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running = "imports"
        self.since = time.perf_counter()

    def begin(self, name: str) -> None:
        """End the part that is running, and begin another one, or go on with it."""
        now = time.perf_counter()
        self.seconds[self.running] = self.seconds.get(self.running, 0.0) + now - self.since
        self.running, self.since = name, now


STARTUP = Startup()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the seconds of a block, or of a decorated function's calls, as this part. Inside another part they count
    for the outer part: for example, measuring the best tree captures CUDA graphs."""
    if STARTUP.running != REST:
        yield
        return
    STARTUP.begin(name)
    try:
        yield
    finally:
        STARTUP.begin(REST)


def end_of_imports() -> None:
    STARTUP.begin(REST)


def parts_so_far() -> dict[str, float]:
    """The seconds of each part, in the order in which they began."""
    STARTUP.begin(STARTUP.running)
    return dict(STARTUP.seconds)


# ----- What need not wait for torch ----------------------------------------------------------------------------------


def wake_gpu() -> None:
    """While torch is imported, let threads create the GPU's context and compute Triton's checksum of itself, which is
    part of the key of every kernel in its cache. Each takes 0.4 s, without Python's lock. Where something is missing or
    broken, nothing happens: torch and Triton try it again, and say so."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no GPU
        return
    for work in (partial(create_context, driver), compute_checksum):
        threading.Thread(target=work, daemon=True).start()


def create_context(driver: ctypes.CDLL) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if not (driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0)):  # 0 is success
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # what torch uses too


def compute_checksum() -> None:
    with suppress(Exception):
        from triton.runtime.cache import triton_key  # Triton imports no torch, or the two could wait for each other
        triton_key()
