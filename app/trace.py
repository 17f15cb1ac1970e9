"""Trace a few cycles with their phases by name, as a Chrome trace for ui.perfetto.dev or chrome://tracing.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 \\
        --prompt "Why is the sky blue?" --profile trace.json.gz

A CUDA graph has no phases. So on a GPU, CYCLES cycles are launched from Python, where each phase stands above the
kernels that it launches: they show what is done. Then CYCLES cycles are replayed as graphs, as in decoding: they show
how fast it is.

While the trace is recorded, some methods of one engine are replaced by versions that put a named range around the call.
So decoding without --profile pays nothing for it.
"""
import contextlib
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine import Engine
from formats.writing import write_bytes
from sampling import Sampling

CYCLES = 5  # of each kind
PHASES = ("prefill", "draft", "verify", "accept and commit")
LAUNCHED = "cycle, launched from Python"
REPLAYED = "cycle, a CUDA graph"
# CUDA graphs do not survive if CUPTI is torn down between two profiles. Kineto prints only fatal errors.
ENVIRONMENT = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1", "KINETO_LOG_LEVEL": "6"}


# ----- Recording -------------------------------------------------------------------------------------------------


def in_range(name: str, function: Callable) -> Callable:
    """A function that does the same within a range of this name in the trace."""
    def call(*inputs: object) -> object:
        with record_function(name):
            return function(*inputs)
    return call


@contextlib.contextmanager
def named_phases(engine: Engine) -> Iterator[None]:
    """Inside, the cycles of this engine and their phases are named ranges."""
    parts = [(engine, "prefill", "prefill"), (engine.drafter, "propose", "draft"), (engine, "verify", "verify"),
             (engine, "commit", "accept and commit"), (engine, "cycle", LAUNCHED)]
    for owner, method, name in parts:
        setattr(owner, method, in_range(name, getattr(owner, method)))  # on the object: it hides the class's method
    try:
        yield
    finally:
        for owner, method, _ in parts:
            delattr(owner, method)


@contextlib.contextmanager
def without_graphs(engine: Engine) -> Iterator[None]:
    """Inside, the engine launches its cycles from Python."""
    graphs = engine.graphs
    engine.graphs = None
    try:
        yield
    finally:
        engine.graphs = graphs


@contextlib.contextmanager
def named_replays(engine: Engine) -> Iterator[None]:
    """Inside, each replay of a graph, of a cycle or of a chunk of the prompt, is a named range."""
    captured = engine.captured

    def named_captured(function: Callable[[], None], *key: object) -> Callable[[], None]:
        name = REPLAYED if key[0] == "cycle" else "prefill, a CUDA graph"
        return in_range(name, captured(function, *key))
    engine.captured = named_captured  # hides the class's method
    try:
        yield
    finally:
        del engine.captured


def decode(engine: Engine, ids: list[int], sampling: Sampling) -> None:
    """Prefill and CYCLES cycles, in spite of stop ids. Fewer cycles where the context is full; on a GPU one more, which
    runs ahead."""
    stop_ids = engine.stop_ids.clone()
    engine.stop_ids.fill_(-1)  # in place, since graphs read this tensor
    try:
        for _ in islice(engine.generate(ids, engine.max_seq_len, sampling), 1 + CYCLES):
            pass
        if engine.cuda:
            torch.cuda.synchronize()
    finally:
        engine.stop_ids.copy_(stop_ids)


def write_trace(engine: Engine, ids: list[int], sampling: Sampling, path: Path) -> str:
    """Trace the engine on this prompt and write `path`, compressed if it ends in .gz. Returns the text to show."""
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * engine.cuda
    for _ in range(2):  # the first round starts the profiler and compiles what graphs do not need; it is thrown away
        with profile(activities=kinds) as profiler:
            with named_phases(engine), without_graphs(engine):
                decode(engine, ids, sampling)
            if engine.graphs is not None:
                with named_replays(engine):
                    decode(engine, ids, sampling)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(plain))
        data = plain.read_bytes()
    write_bytes(path, gzip.compress(data) if path.suffix == ".gz" else data)
    return (f"{table(means(json.loads(data)['traceEvents']), engine.cuda)}\n"
            "(The profiler slows Python down; `python -m benchmarks.cycle` times the parts without it.)\n"
            f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it at https://ui.perfetto.dev or chrome://tracing")


# ----- Reading the trace -----------------------------------------------------------------------------------------

Span = tuple[float, float]  # beginning and end, us


class Range(NamedTuple):
    """One named range of a trace."""
    host_us: float  # from its beginning to its end on the host
    kernels: list[Span]  # when the GPU ran the kernels that were launched in it, which may be later


class Mean(NamedTuple):
    """Of all ranges with one name."""
    count: int
    host_ms: float
    gpu_ms: float  # in which the GPU ran any of their kernels


def named_ranges(events: list[dict]) -> dict[str, list[Range]]:
    """The ranges of PHASES, LAUNCHED and REPLAYED in a trace, by name."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in (*PHASES, LAUNCHED, REPLAYED)]
    launches = [(e["ts"], e["args"]["correlation"]) for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})]
    kernels: dict[int | None, list[Span]] = {}  # by the launch's correlation id: a graph launches many
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.setdefault(e["args"].get("correlation"), []).append((e["ts"], e["ts"] + e["dur"]))
    found: dict[str, list[Range]] = {}
    for e in ranges:
        inside = [key for ts, key in launches if 0 <= ts - e["ts"] <= e["dur"]]
        own = [span for key in inside for span in kernels.get(key, [])]
        found.setdefault(e["name"], []).append(Range(e["dur"], own))
    return found


def means(events: list[dict]) -> dict[str, Mean]:
    return {name: Mean(len(ranges), fmean(r.host_us for r in ranges) / 1e3,
                       fmean(covered(r.kernels) for r in ranges) / 1e3)
            for name, ranges in named_ranges(events).items()}


def covered(spans: list[Span]) -> float:
    """The length of the union of the spans: kernels may overlap."""
    total = 0.0
    end = float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def table(found: dict[str, Mean], cuda: bool) -> str:
    lines = [f"{'mean of':27}{'times':>6}{'host, ms':>11}" + "GPU busy, ms".rjust(15) * cuda]
    for name in (*PHASES, LAUNCHED, REPLAYED):
        if name in found:
            count, host_ms, gpu_ms = found[name]
            lines.append(f"{name:27}{count:6}{host_ms:11.3f}" + f"{gpu_ms:15.3f}" * cuda)
    return "\n".join(lines)
