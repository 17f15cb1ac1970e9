"""Milliseconds of parts of a cycle: what bench.py reports, and what autotree.py chooses a tree by."""
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from engine import Engine, capture

Timer = Callable[[Callable[[], object], torch.device], float]


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")


def timed(function: Callable[[], object], device: torch.device, unroll: int = 10, rounds: int = 5,
          calls: int | None = None) -> float:
    """Milliseconds of one call, the median of `rounds` of so many calls (30, on a CPU 3). On a GPU `unroll` calls are
    one CUDA graph: the launch of a graph costs a few microseconds, as much as a small part, and a part within a cycle
    does not pay it."""
    cuda = device.type == "cuda"
    calls, unroll = (calls or 30, unroll) if cuda else (calls or 3, 1)
    replay = capture(function, unroll) if cuda else function
    replay()
    return median(elapsed(replay, calls // unroll, device) for _ in range(rounds)) / calls


def elapsed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds that `calls` calls take together."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@torch.inference_mode()
def verify_by_rows(engine: Engine, counts: tuple[int, ...], timer: Timer = timed) -> dict[int, float]:
    """ms of a frozen engine's verification of so many nodes, a chain of any tokens."""
    base = engine.state.length - 1
    return {rows: timer(partial(engine.verify, base, engine.chain(rows)), engine.device) for rows in counts}
