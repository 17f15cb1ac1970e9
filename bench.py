"""Where the time of a decode cycle goes, and what the cycle gains: EAGLE-2, plain decoding, and other engines.

    python bench.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --shape llama-2-7b --rows

With --shape the checkpoint is widened (widen.py): every weight of a 7B is read and multiplied, the text and how often
drafts are accepted are the small model's. Each part of a cycle is timed alone, on a GPU as a CUDA graph of its own
between two events, at one moment in the middle of a generation: `freeze` stops the text there, and a cycle does the
same work again and again. Tokens a second are wall-clock of whole generations: greedy, prefill left out, methods in
turns. Prints Markdown; --json FILE writes the same numbers and more. Other engines run in this process on these weights
(baselines.py): --transformers is `generate` with its two kinds of cache, --gpt_fast CLONE.
"""
import argparse
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch

import linears
from autotree import fit, read_curve
from baselines import Decoder, Run, gpt_fast_decoder, transformers_decoder
from draft import Eagle2, find_head
from engine import Engine, Sampling, Vanilla
from generate import CPU_TREE, DTYPES, GPU_TREE, fail, nodes
from quantizers import GROUPS, MODES
from timing import timed, verify_by_rows
from widen import SHAPES
from workload import gigabytes, kv_gigabytes, load, step_gb

ROWS = (1, 8, 16, 32, 48, 60, 64)
QUESTIONS = Path(__file__).parent / "bench_questions.jsonl"


def bandwidth(device: torch.device) -> dict[str, float]:
    """The best GB/s of memory: that a sum reads, and that a copy reads and writes together."""
    x = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)  # fp32: 2 GiB, far beyond any cache
    y, gb = torch.empty_like(x), 4e-9 * len(x)
    read, copy = (min(timed(f, device, 1, 1) for _ in range(5)) for f in (x.sum, partial(y.copy_, x)))
    return {"read_gb_s": 1e3 * gb / read, "copy_gb_s": 2e3 * gb / copy}


def freeze(engine: Engine, ids: list[int], new_tokens: int) -> int:
    """Continue the prompt by some `new_tokens`, then call it done: from here on a cycle does all its work and commits
    nothing. (It moves features all the same: drafts become bad ones, which cost as much.) Returns the text's length."""
    for new in engine.generate(ids, len(engine.state.tokens), Sampling()):
        new_tokens -= len(new)
        if new_tokens <= 0:
            break
    engine.state.done.fill_(True)
    return int(engine.state.length)


@torch.inference_mode()
def cycle_parts(engine: Engine) -> list[dict]:
    """The parts of a frozen engine's cycle, in order: ms, and the GB of weights, keys and values that each reads."""
    state, drafter, model, length, parts = engine.state, engine.drafter, engine.model, int(engine.state.length), []
    draft_gb = gigabytes(drafter.fc, drafter.lm_head, drafter.head.layer) + kv_gigabytes(drafter.head.kv, length)

    def part(name: str, gb: float, function: Callable[[], object]) -> object:
        parts.append({"part": name, "ms": timed(function, engine.device), "gb": gb})
        return function()  # what the next part reads, outside of any graph

    where, hidden, level = part(f"draft: extend, {drafter.max_depth + 1} rows", draft_gb, partial(drafter.begin, state))
    for depth in range(1, drafter.levels):
        hidden, level = part(f"draft: expansion {depth}, {drafter.topk} rows", draft_gb,
                             partial(drafter.expand, state, where, hidden, level, depth))
    tree = part("rerank", 0, partial(drafter.rerank, state))
    features, chosen = part(f"verify, {len(tree.tokens)} rows", step_gb(model, length),
                            partial(engine.verify, where[0], tree))
    part("accept and compact", 0, partial(engine.commit, where[0], tree, features, chosen))
    return parts


def run(engine: Engine, ids: list[int], new_tokens: int) -> Run:
    tokens, cycles, start = [], -1, 0.0
    for new in engine.generate(ids, new_tokens, Sampling()):
        start = start or time.perf_counter()  # when the token of prefill is there
        tokens += new
        cycles += 1
    return Run(tokens, len(tokens) - 1, cycles, time.perf_counter() - start)


def race(decoders: dict[str, Decoder], prompts: list[list[int]], new_tokens: int, rounds: int
         ) -> dict[str, list[list[Run]]]:
    """All prompts through each decoder in turn, `rounds` times; what happens once (capture, compilation) before, with
    the longest: others compile again for a longer cache."""
    for decode in decoders.values():
        decode(max(prompts, key=len), new_tokens)
    runs = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            runs[name].append([decode(ids, new_tokens) for ids in prompts])
    return runs


def score(runs: list[list[Run]], texts: list[list[int]]) -> dict:
    """The median over rounds of all tokens / all seconds, and how many texts are those of vanilla."""
    gained, cycles = (max(1, sum(getattr(r, what) for r in runs[0])) for what in ("gained", "cycles"))
    seconds = median(sum(r.seconds for r in each) for each in runs)
    return {"tokens_per_sec": gained / seconds, "mean_gained": gained / cycles, "cycle_ms": 1e3 * seconds / cycles,
            "same": sum(r.tokens == text for r, text in zip(runs[0], texts)), "prompts": len(runs[0])}


def measure(engines: dict[str, Engine], prompts: list[list[int]], args: argparse.Namespace) -> dict:
    """Everything about our own two methods at one context."""
    vanilla, eagle = engines.values()
    runs = race({name: partial(run, e) for name, e in engines.items()}, prompts, args.max_new_tokens, args.rounds)
    texts = [r.tokens for r in runs["vanilla"][0]]
    speed = {name: score(each, texts) for name, each in runs.items()}
    gaps = []  # vanilla's two best logits where the texts part: near 0, rounding decided
    for ids, a, b in zip(prompts, texts, (r.tokens for r in runs["eagle2"][0])):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            gaps.append(vanilla.top2_gap(ids + a[:at]))
    middle = freeze(vanilla, prompts[0], args.max_new_tokens // 2)
    vanilla_ms, vanilla_gb = timed(vanilla.cycle, vanilla.device, 1), step_gb(vanilla.model, middle)
    length = freeze(eagle, prompts[0], args.max_new_tokens // 2)
    parts, cycle_ms = cycle_parts(eagle), timed(eagle.cycle, eagle.device, 1)
    fast, verify_ms = speed["eagle2"], parts[-2]["ms"]
    return {"context": max(map(len, prompts)), "timed_at": length,
            "parts": parts, "sum_ms": sum(p["ms"] for p in parts), "cycle_ms": cycle_ms,
            "cycle_gb": sum(p["gb"] for p in parts), "between_ms": fast["cycle_ms"] - cycle_ms,
            "vanilla_ms": vanilla_ms, "vanilla_gb": vanilla_gb, "verify_ratio": verify_ms / vanilla_ms,
            "cycle_ratio": cycle_ms / vanilla_ms, "rows_ms": verify_by_rows(eagle, ROWS) if args.rows else {},
            "speed": speed, "gaps": gaps, "texts": texts,
            "efficiency": fast["tokens_per_sec"] * cycle_ms / 1e3 / fast["mean_gained"]}


def startup(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of a process of generate.py to its first text, without and with compiled kernels; the
    libraries have been read from the disk by this process."""
    seconds, command = {}, [
        sys.executable, Path(__file__).parent / "generate.py", "--checkpoint", args.checkpoint, "--eagle2", "--prompt",
        "Why is the sky blue?", "--max_new_tokens", "8", "--device", args.device, "--dtype", args.dtype,
        *(["--draft", args.draft] if args.draft else []),
        *(["--draft_vocab", str(args.draft_vocab)] if args.draft_vocab is not None else []),
        *(["--quantize", args.quantize] if args.quantize else []),
        *(["--group", str(args.group)] if args.group else [])]
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start, env = time.perf_counter(), os.environ | {"TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
                child.stdout.read(1)
                seconds[name] = time.perf_counter() - start
                child.stdout.read()
            if child.returncode:
                raise ValueError(f"--startup: generate.py ended with exit code {child.returncode}")
    return seconds


def describe(args: argparse.Namespace) -> str:
    """The line above every table: device, versions, and what the numbers are of."""
    device = f"{torch.get_num_threads()} threads of a CPU ({torch.backends.cpu.get_cpu_capability()})"
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
        if shutil.which("nvidia-smi"):
            query = subprocess.run(
                ["nvidia-smi", "-i", f"GPU-{torch.cuda.get_device_properties(0).uuid}", "--format=csv,noheader",
                 "--query-gpu=power.limit,clocks.sm,clocks.max.sm,clocks.mem"], capture_output=True, text=True)
            limit, now, most, memory = (query.stdout.strip().split(", ") + ["?"] * 4)[:4]
            device += f" (power limit {limit}, SM clock {now} of {most}, memory {memory})"
    weights = args.quantize or (args.checkpoint.stem if args.checkpoint.is_file() else "")
    line = (f"{device}, torch {torch.__version__}, triton {getattr(linears.triton, '__version__', 'absent')}, "
            f"{args.dtype}{weights and ', weights ' + weights}, {time.strftime('%Y-%m-%d')}.")
    return line if args.shape is None else (
        f"{line} {args.shape} is a shape: its cost, with the text and acceptance of {args.checkpoint.name}.")


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def table(result: dict, *rows: tuple) -> str:
    """Markdown, in columns, under the line that says what was measured."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([wrapped(result["device"]), "", *lines, ""])


def speed_table(result: dict, part: dict) -> str:
    base = part["speed"]["vanilla"]["tokens_per_sec"]
    head = (f"prompts of at most {part['context']} tokens", "tokens/s", "speed-up", "tokens a cycle", "ms a cycle",
            "same text")
    return table(result, head, *((
        name, f"{s['tokens_per_sec']:.1f}", f"{s['tokens_per_sec'] / base:.2f}", f"{s['mean_gained']:.2f}",
        f"{s['cycle_ms']:.3f}", f"{s['same']} of {s['prompts']}") for name, s in part["speed"].items()))


def report(result: dict, part: dict) -> str:
    """Our own two methods at one context."""
    def line(name: str, ms: float, gb: float) -> tuple:
        rate = 1e3 * gb / ms
        share = f"{rate / result['read_gb_s']:.0%}"
        return (name, f"{ms:.3f}", f"{gb:.2f}", f"{rate:.0f}", share) if gb else (name, f"{ms:.3f}", "", "", "")

    allowed = 1e3 * part["speed"]["eagle2"]["mean_gained"] / part["cycle_ms"]
    note = f"eagle2 reaches {part['efficiency']:.1%} of the {allowed:.1f} tokens/s that its captured cycle allows."
    if part["gaps"]:
        note += f" Where a text parts from vanilla's, the two best logits are at most {max(part['gaps']):.3g} apart."
    tables = [speed_table(result, part) + f"\n{wrapped(note)}\n", table(
        result, (f"after {part['timed_at']} tokens", "ms", "GB read", "GB/s", f"of {result['read_gb_s']:.0f} GB/s"),
        *(line(p["part"], p["ms"], p["gb"]) for p in part["parts"]),
        line("sum of these", part["sum_ms"], part["cycle_gb"]), line("cycle", part["cycle_ms"], part["cycle_gb"]),
        line("between two cycles (wall-clock)", part["between_ms"], 0),
        line("vanilla's cycle", part["vanilla_ms"], part["vanilla_gb"]),
        ("verify / vanilla", f"{part['verify_ratio']:.2f}", "", "", ""),
        ("cycle / vanilla", f"{part['cycle_ratio']:.2f}", "", "", ""))]
    if part["rows_ms"]:
        tables.append(table(result, ("rows verified", *part["rows_ms"]),
                            ("ms", *(f"{ms:.3f}" for ms in part["rows_ms"].values()))))
    return "\n".join(tables)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Time the parts of a decode cycle, and EAGLE-2 against plain decoding.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--draft", type=Path, help="draft head: its folder, or a file in it (default: <checkpoint>/eagle)")
    p.add_argument("--quantize", choices=MODES, help="quantise target and draft head, after widening")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--draft_vocab", type=int, help="draft only so many of the head's frequent tokens; 0: all")
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: as it is)")
    p.add_argument("--contexts", type=int, nargs="+", default=[512, 3500],
                   help="tokens of the prompts; 0: the questions alone")
    p.add_argument("--tree", type=nodes, nargs="+", metavar="N", help="of EAGLE-2: nodes, levels and top-k; or auto")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--questions", type=Path, default=QUESTIONS, help='JSON lines with "turns"; the first is asked')
    p.add_argument("--rounds", type=int, default=3, help="how often the methods take turns")
    p.add_argument("--rows", action="store_true", help="also time the verification of 1 to 64 nodes")
    p.add_argument("--startup", action="store_true", help="also time generate.py from its start to its first text")
    p.add_argument("--transformers", action="store_true", help="also run transformers on two of the prompts")
    p.add_argument("--gpt_fast", type=Path, help="also run gpt-fast on two of the prompts: the folder of its clone")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, help="write all numbers to this file")
    args = p.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.contexts.sort()  # other engines' caches grow with the context, and never shrink
    for wrong, message in (
            (args.max_new_tokens < 2 or args.rounds < 1, "--max_new_tokens must be 2 or more, --rounds 1 or more"),
            (args.startup and args.shape, "--startup is for a checkpoint as it is, without --shape"),
            (args.tree not in (None, ["auto"]) and (len(args.tree) != 3 or "auto" in args.tree),
             "--tree takes nodes, levels and top-k, or auto"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own"),
            (args.quantize and (args.transformers or args.gpt_fast), "other engines run without --quantize"),
            (args.gpt_fast and not (args.gpt_fast / "model.py").is_file(), f"--gpt_fast {args.gpt_fast}: no model.py "
             "there; clone github.com/meta-pytorch/gpt-fast and check out 32971d3"),
            (args.transformers and not importlib.util.find_spec("transformers"),
             "--transformers: not installed; pip install -r requirements-dev.txt")):
        if wrong:
            p.error(message)
    return args


def bench(args: argparse.Namespace, result: dict) -> None:
    """Measure, print, and fill `result`."""
    device, n = torch.device(args.device), args.max_new_tokens
    result |= {"arguments": {name: str(value) for name, value in vars(args).items()}, "contexts": [],
               **bandwidth(device), "startup_s": startup(args) if args.startup else {}, "device": describe(args)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # bandwidth is not counted, loading is
    model, head, prompts, stop_ids = load(args)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantising left behind; a quantised file leaves nothing
    slots = max(len(ids) for group in prompts for ids in group) + n
    usual = GPU_TREE if device.type == "cuda" else CPU_TREE
    tree = args.tree or usual
    if args.tree == ["auto"]:
        curve = read_curve(args.draft or find_head(args.checkpoint))
        tree = fit(model, head, curve, slots, show=True) or usual
    engines = {"vanilla": Engine(model, Vanilla(device), slots, stop_ids),
               "eagle2": Engine(model, Eagle2(head, model, *tree), slots, stop_ids)}
    for group in prompts:
        result["contexts"].append(measure(engines, group, args))
        print(report(result, result["contexts"][-1]), flush=True)
    result["memory_gb"] = (torch.cuda.max_memory_allocated() if device.type == "cuda" else
                           1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
    row = {"GB/s of a sum": result["read_gb_s"], "of a copy, both ways": result["copy_gb_s"],
           "peak memory, GB": result["memory_gb"]}
    if device.type == "cuda":  # the CUDA context and all that the allocator keeps as well
        free, total = torch.cuda.mem_get_info()
        row["in use on the device, GB"] = result["device_gb"] = (total - free) / 1e9
    row |= {f"first text, {name} start, s": seconds for name, seconds in result["startup_s"].items()}
    print(table(result, tuple(row), tuple(f"{x:.1f}" for x in row.values())), flush=True)
    others = {f"transformers, {cache} cache": transformers_decoder(model, stop_ids, cache)
              for cache in ("dynamic", "static") if args.transformers}
    others |= {"gpt-fast": gpt_fast_decoder(model, stop_ids, args.gpt_fast)} if args.gpt_fast else {}
    for part, group in zip(result["contexts"], prompts):
        for name, decode in others.items():  # one may take minutes to compile: what is known so far is shown
            part["speed"][name] = score(race({name: decode}, group[:2], n, 1)[name], part["texts"])
            print(speed_table(result, part), flush=True)


def main() -> None:
    args, result = parse_args(), {}
    try:
        bench(args, result)
    except (ValueError, OSError) as e:
        sys.exit(fail(e))
    finally:
        if args.json and result.get("contexts"):  # other engines come last: their failure costs nothing of ours
            args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
