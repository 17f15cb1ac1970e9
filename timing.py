"""Milliseconds of whole generations and of parts of a cycle, and what they were measured on: for bench.py and cycle.py,
and for autotree.py, which chooses a tree by them."""
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import linears
from engine import Engine, Sampling, capture

Timer = Callable[[Callable[[], object], torch.device], float]
CLOCKS = ("power.limit", "clocks.sm", "clocks.max.sm", "clocks.mem", "temperature.gpu", "driver_version")


class Run(NamedTuple):
    """One generation. The first token, which prefill chose, counts in `tokens` alone."""
    tokens: list[int]  # up to the stop id, if there is one
    gained: list[int]  # tokens committed by each cycle
    prefill_s: float  # until the first token is there
    decode_s: float  # from then on


def run(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling(),
        show: Callable[[list[int]], bool | None] = lambda new: None) -> Run:
    """`show` gets the tokens as they come, and ends the text by saying True."""
    tokens, gained = [], []
    if engine.cuda:
        torch.cuda.synchronize()  # the cycle that ran ahead of the last text's end
    start = time.perf_counter()
    for new in engine.generate(ids, new_tokens, sampling):
        if tokens:
            gained.append(len(new))
        else:
            first = time.perf_counter()  # reading `new` back waited for the device
        tokens += new
        if show(new):
            break
    return Run(tokens, gained, first - start, time.perf_counter() - first)


def freeze(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling()) -> int:
    """Continue the prompt by some `new_tokens`, then call it done: from here on a cycle does all its work and commits
    nothing. (It moves features all the same: drafts become bad ones, which cost as much.) Returns the text's length."""
    for new in engine.generate(ids, len(engine.state.tokens), sampling):
        new_tokens -= len(new)
        if new_tokens <= 0:
            break
    engine.state.done.fill_(True)
    return int(engine.state.length)


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


def environment(device: torch.device) -> dict[str, str]:
    """What decides how long things take, and is not on the command line. Clocks are those of this moment."""
    folder, known = Path(__file__).parent, {"device": device_name(device)}
    if device.type == "cuda" and shutil.which("nvidia-smi"):
        known |= zip(CLOCKS, output("nvidia-smi", "-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}",
                                    "--format=csv,noheader", "--query-gpu=" + ",".join(CLOCKS)).split(", "))
    commit = output("git", "-C", str(folder), "rev-parse", "--short", "HEAD") or "unknown"
    changed = output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return known | {"torch": torch.__version__, "triton": getattr(linears.triton, "__version__", "absent"),
                    "cuda": torch.version.cuda or "none", "python": platform.python_version(),
                    "commit": commit + (" and uncommitted changes" if changed else ""),
                    "date": time.strftime("%Y-%m-%d")}


def output(*command: str) -> str:
    """What a program writes; nothing, if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def describe(known: dict[str, str]) -> str:
    """`environment` in a line, for people."""
    clocks = "power limit {}, SM clock {} of {}, memory {}, {} °C, driver {}"
    device = known["device"]
    if CLOCKS[-1] in known:
        device += f" ({clocks.format(*(known[name] for name in CLOCKS))})"
    return f"{device}, torch {known['torch']}, triton {known['triton']}, commit {known['commit']}, {known['date']}"


def peak_gb(device: torch.device) -> float:
    """The most that was in use: on a GPU by tensors, since the last reset; else by the process."""
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
