"""A picture of a few cycles: a Chrome trace with their phases by name, for chrome://tracing or ui.perfetto.dev.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --prompt "Why is the sky \\
        blue?" --profile trace.json.gz

A CUDA graph knows no phases. So on a GPU some cycles are launched from Python, where each phase stands above the
kernels that it launches, and then some are replayed, as decoding does it. The first show what is done, the second how
fast.

The names are put around the parts of one engine for as long as the profile takes: at other times nobody pays for them.
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

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine import Engine
from sampling import Sampling

CYCLES = 5  # of each kind
PHASES = ("prefill", "draft", "verify", "accept and commit")
LAUNCHED, REPLAYED = "cycle, launched from Python", "cycle, a CUDA graph"
# Between two profiles CUPTI must not be torn down, for CUDA graphs do not survive that; and Kineto must not chat
ENVIRONMENT = {"TEARDOWN_CUPTI": "0", "DISABLE_CUPTI_LAZY_REINIT": "1", "KINETO_LOG_LEVEL": "6"}


def named(name: str, function: Callable) -> Callable:
    def call(*inputs: object) -> object:
        with record_function(name):
            return function(*inputs)
    return call


@contextlib.contextmanager
def phases(engine: Engine) -> Iterator[None]:
    """Within it, the parts of the engine's cycles are named ranges of a trace."""
    parts = [(engine, "prefill", "prefill"), (engine.drafter, "propose", "draft"), (engine, "verify", "verify"),
             (engine, "commit", "accept and commit"), (engine, "cycle", LAUNCHED)]
    for owner, method, name in parts:
        setattr(owner, method, named(name, getattr(owner, method)))  # hides the method of the class
    try:
        yield
    finally:
        for owner, method, _ in parts:
            delattr(owner, method)


@contextlib.contextmanager
def launching(engine: Engine) -> Iterator[None]:
    """Within it, the engine replays no graphs."""
    graphs, engine.graphs = engine.graphs, None
    try:
        yield
    finally:
        engine.graphs = graphs


@contextlib.contextmanager
def replays(engine: Engine) -> Iterator[None]:
    """Within it, each replay of a graph is a named range; what a chunk of a prompt is, is one too."""
    captured = engine.captured

    def name_it(function: Callable[[], None], *key: object) -> Callable[[], None]:
        return named(REPLAYED if key[0] == "cycle" else "prefill, a CUDA graph", captured(function, *key))
    engine.captured = name_it
    try:
        yield
    finally:
        del engine.captured


def decode(engine: Engine, ids: list[int], sampling: Sampling) -> None:
    """Prefill and CYCLES cycles, whatever the stop ids; fewer if there is no room, and on a GPU one more runs ahead."""
    stop_ids = engine.stop_ids.clone()
    engine.stop_ids.fill_(-1)  # in place: graphs read this tensor
    try:
        for _ in islice(engine.generate(ids, engine.max_seq_len, sampling), 1 + CYCLES):
            pass
        if engine.cuda:
            torch.cuda.synchronize()
    finally:
        engine.stop_ids.copy_(stop_ids)


def write_trace(engine: Engine, ids: list[int], sampling: Sampling, path: Path) -> str:
    """Profile the engine on this prompt, after a round that is not recorded, and write `path`, compressed if it ends in
    .gz. Returns the text to show."""
    os.environ |= {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * engine.cuda
    for _ in range(2):  # the first round starts the profiler, and compiles what graphs have no need of
        with profile(activities=kinds) as profiler:
            with phases(engine), launching(engine):
                decode(engine, ids, sampling)
            if engine.graphs is not None:
                with replays(engine):
                    decode(engine, ids, sampling)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(plain))
        data = plain.read_bytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return (f"{table(means(json.loads(data)['traceEvents']), engine.cuda)}\n"
            "(The profiler slows Python down; cycle.py times the parts without it.)\n"
            f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB): open it at https://ui.perfetto.dev or chrome://tracing")


def named_ranges(events: list[dict]) -> dict[str, list[tuple[float, list[tuple[float, float]]]]]:
    """Of each name, for every range of a trace that has it: us on the host from its beginning to its end, and from when
    to when, in us, the GPU ran each of the kernels that were launched in it."""
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in (*PHASES, LAUNCHED, REPLAYED)]
    launches = [(e["ts"], e["args"]["correlation"]) for e in events
                if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})]
    kernels = {}  # by what launched them: a graph launches many
    for e in events:
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels.setdefault(e["args"].get("correlation"), []).append((e["ts"], e["ts"] + e["dur"]))
    found = {}
    for e in ranges:
        own = [span for ts, key in launches if 0 <= ts - e["ts"] <= e["dur"] for span in kernels.get(key, [])]
        found.setdefault(e["name"], []).append((e["dur"], own))
    return found


def means(events: list[dict]) -> dict[str, tuple[int, float, float]]:
    """Of each named range of a trace: how often it is there, mean ms on the host, and mean ms in which the GPU ran any
    of its kernels."""
    return {name: (len(each), fmean(us for us, _ in each) / 1e3, fmean(covered(own) for _, own in each) / 1e3)
            for name, each in named_ranges(events).items()}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def table(found: dict[str, tuple[int, float, float]], cuda: bool) -> str:
    lines = [f"{'mean of':27}{'times':>6}{'host, ms':>11}" + "GPU busy, ms".rjust(15) * cuda]
    for name in (*PHASES, LAUNCHED, REPLAYED):
        if name in found:
            times, host, gpu = found[name]
            lines.append(f"{name:27}{times:6}{host:11.3f}" + f"{gpu:15.3f}" * cuda)
    return "\n".join(lines)
