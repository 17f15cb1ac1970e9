"""CUDA graphs: capturing them, and timing what they replay.

A graph launches the few hundred kernels of a cycle with one call. The kernels in it are the project's own:
torch.compile (Inductor) was measured beside them and took 12 % longer a layer (docs/experiments.md).
"""
import time
from collections.abc import Callable
from functools import cache
from statistics import median

import torch
from torch import Tensor

from ops.startup import part


@part("CUDA graphs")
def capture(function: Callable[[], object], unroll: int = 1) -> Callable[[], None]:
    """Record `unroll` calls of `function` as one CUDA graph, and return what replays it.

    Runs `function` once before, which compiles its kernels. All graphs share one pool for temporary memory: replaying
    a graph may overwrite what another one left there.
    """
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=graph_memory().pool()):
        for _ in range(unroll):
            function()
    return graph.replay


@cache
def graph_memory() -> torch.cuda.CUDAGraph:
    """The graph whose memory pool all CUDA graphs allocate from: only one of them runs at a time. It is never
    replayed. It keeps the pool alive when an engine is freed together with the last of the other graphs."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")
    return graph


Timer = Callable[[Callable[[], object], torch.device], float]  # such as `timed`


def timed(function: Callable[[], object], device: torch.device, unroll: int = 10, rounds: int = 5,
          calls: int | None = None) -> float:
    """Milliseconds of one call: the median of `rounds` rounds of `calls` calls (default: 30, on a CPU 3).

    On a GPU, one CUDA graph holds `unroll` calls, and `calls` is a multiple of that. Launching a graph costs a few
    microseconds, as much as a small part of a cycle; unrolling spreads that cost, which such a part does not have.
    """
    cuda = device.type == "cuda"
    if calls is None:
        calls = 30 if cuda else 3
    if not cuda:
        unroll = 1
    replay = capture(function, unroll) if cuda else function
    replay()
    assert calls % unroll == 0, "a round is whole graphs"
    return median(elapsed(replay, calls // unroll, device) for _ in range(rounds)) / calls


def elapsed(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Milliseconds that `calls` calls take together."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return 1e3 * (time.perf_counter() - start)
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class Mailbox:
    """Two copies on the host of `report` (see tree.accept_commit): one is read while the next cycle fills the other."""

    def __init__(self, report: Tensor) -> None:
        self.report = report
        self.copies = torch.zeros(2, len(report), dtype=report.dtype, pin_memory=report.is_cuda)
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()] if report.is_cuda else None

    def send(self, turn: int) -> None:
        """Enqueue the copy of the report to the host, without waiting for it."""
        self.copies[turn % 2].copy_(self.report, non_blocking=True)
        if self.arrived:
            self.arrived[turn % 2].record()

    def receive(self, turn: int) -> list[int]:
        """Wait for the report of this turn: how many tokens were committed, whether the text has ended, the tokens."""
        if self.arrived:
            self.arrived[turn % 2].synchronize()
        return self.copies[turn % 2].tolist()
