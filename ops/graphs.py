"""CUDA graphs: capturing one, and timing what they replay."""
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
from torch import Tensor


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


class Mailbox:
    """The host's copies of `report`: one of the cycle that it reads, one of the cycle that runs meanwhile."""

    def __init__(self, report: Tensor) -> None:
        self.report = report
        self.copies = torch.zeros(2, len(report), dtype=report.dtype, pin_memory=report.is_cuda)
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()] if report.is_cuda else None

    def send(self, turn: int) -> None:
        """Copy the report to the host as soon as the device gets there."""
        self.copies[turn % 2].copy_(self.report, non_blocking=True)
        if self.arrived:
            self.arrived[turn % 2].record()

    def receive(self, turn: int) -> list[int]:
        """Wait for the report of this turn: how many tokens were committed, whether the text has ended, the tokens."""
        if self.arrived:
            self.arrived[turn % 2].synchronize()
        return self.copies[turn % 2].tolist()
