"""CUDA graphs: capturing one, and timing what they replay."""
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch


def capture(function: Callable[[], object], unroll: int = 1) -> Callable[[], None]:
    """`unroll` calls of `function` as a CUDA graph; calling the result replays them. Runs it twice before, which
    compiles its kernels. What a graph leaves in its temporary memory, the next one that is replayed may overwrite."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graph_memory().pool()):
        for _ in range(unroll):
            function()
    return graph.replay


@cache
def graph_memory() -> torch.cuda.CUDAGraph:
    """Whose memory all graphs take for their temporary tensors: no two are replayed at once. This one never is; it
    keeps that memory when an engine goes with the last of the others."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph


Timer = Callable[[Callable[[], object], torch.device], float]


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
