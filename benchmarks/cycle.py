"""Where the time of an EAGLE-2 cycle goes: its parts, what they read, and what is lost between two cycles.

    python cycle.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --shape llama-2-7b --rows

With --shape the checkpoint is widened (widen.py): every weight of a 7B is read and multiplied, the text and how often
drafts are accepted are the small model's. Each part of a cycle is timed alone, on a GPU as a CUDA graph of its own
between two events, at one moment in the middle of a generation: `freeze` stops the text there, and a cycle does the
same work again and again. Tokens a second are wall-clock of whole generations: greedy, prefill left out, in turns with
plain decoding. Prints Markdown; --json FILE writes the same numbers and more. To compare methods: bench.py.
"""
import argparse
import json
import os
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

from app.answer import Run, run
from app.options import DTYPES, fail
from benchmarks.environment import describe, environment
from benchmarks.report import table
from benchmarks.widen import SHAPES
from benchmarks.workload import (
    Prompt,
    describe_subject,
    fill_context,
    freeze,
    gigabytes,
    kv_gigabytes,
    load,
    load_weights,
    step_gb,
)
from draft import Eagle2, Vanilla
from drafters.methods import CPU_TREE, GPU_TREE, tree_nodes
from drafters.tree_size import fit, read_curve, verify_by_rows
from engine import Engine
from formats.eagle import find_head
from formats.questions import read_questions
from model import Llama
from ops.device import peak_gb
from ops.graphs import timed
from quant.linear import GROUPS, MODES
from tokenizer import Tokenizer

ROWS = (1, 8, 16, 32, 48, 60, 64)
QUESTIONS = Path(__file__).parent / "cycle_questions.jsonl"


def bandwidth(device: torch.device) -> dict[str, float]:
    """The best GB/s of memory: that a sum reads, and that a copy reads and writes together."""
    x = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)  # fp32: 2 GiB, far beyond any cache
    y, gb = torch.empty_like(x), 4e-9 * len(x)
    read, copy = (min(timed(f, device, 1, 1) for _ in range(5)) for f in (x.sum, partial(y.copy_, x)))
    return {"read_gb_s": 1e3 * gb / read, "copy_gb_s": 2e3 * gb / copy}


@torch.inference_mode()
def cycle_parts(engine: Engine) -> list[dict]:
    """The parts of a frozen engine's cycle, in order: ms, and the GB of weights, keys and values that each reads."""
    state, drafter, model, length, parts = engine.state, engine.drafter, engine.model, int(engine.state.length), []
    fc_gb, level_gb = gigabytes(drafter.fc), gigabytes(drafter.lm_head, drafter.head.layer) + kv_gigabytes(
        drafter.head.kv, length)

    def part(name: str, gb: float, function: Callable[[], object]) -> object:
        parts.append({"part": name, "ms": timed(function, engine.device), "gb": gb})
        return function()  # what the next part reads, outside of any graph

    below = [fc_gb] * (drafter.levels - 1) + [0]  # below the last level nothing is drafted
    scratch, fc_of_feature, level = part(f"draft: extend, {drafter.max_depth + 1} rows", fc_gb + level_gb + below[0],
                                partial(drafter.begin, state))
    for depth in range(1, drafter.levels):
        fc_of_feature, level = part(f"draft: expansion {depth}, {drafter.topk} rows", level_gb + below[depth],
                             partial(drafter.expand, state, scratch, fc_of_feature, level, depth))
    tree = part("rerank", 0, partial(drafter.rerank, state))
    features, chosen = part(f"verify, {len(tree.tokens)} rows", step_gb(model, length),
                            partial(engine.verify, scratch[0, 0], tree))
    part("accept and compact", 0, partial(engine.commit, scratch[0, 0], tree, features, chosen))
    return parts


def score(runs: list[list[Run]]) -> dict[str, float]:
    """The median over rounds of all tokens / all seconds."""
    gained, cycles = sum(sum(r.gained) for r in runs[0]), max(1, sum(len(r.gained) for r in runs[0]))
    seconds = median(sum(r.decode_s for r in each) for each in runs)
    return {"tokens_per_sec": gained / seconds, "mean_gained": gained / cycles, "cycle_ms": 1e3 * seconds / cycles}


def measure(engines: dict[str, Engine], prompts: list[list[int]], args: argparse.Namespace) -> dict:
    """Everything about one context."""
    vanilla, eagle = engines.values()
    for engine in engines.values():  # capture, compilation
        run(engine, prompts[0], args.max_new_tokens)
    runs = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            runs[name].append([run(engine, ids, args.max_new_tokens) for ids in prompts])
    speed = {name: score(each) for name, each in runs.items()}
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
            "speed": speed, "texts": [r.tokens for r in runs["eagle2"][0]],
            "efficiency": fast["tokens_per_sec"] * cycle_ms / 1e3 / fast["mean_gained"]}


def startup(args: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of a generate.py process to its first text, without and with compiled kernels; the
    libraries have been read from the disk by this process."""
    seconds, command = {}, [
        sys.executable, Path(__file__).parent.parent / "generate.py", "--checkpoint", args.checkpoint, "--eagle2",
        "--prompt", "Why is the sky blue?", "--max_new_tokens", "8", "--device", args.device, "--dtype", args.dtype,
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


def about(args: argparse.Namespace) -> str:
    """The line above every table: device, versions, and what the numbers are of."""
    return f"{describe(environment(torch.device(args.device)))}, {describe_subject(args)}"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def report(result: dict, part: dict) -> str:
    """Everything about one context."""
    def line(name: str, ms: float, gb: float) -> tuple:
        rate = 1e3 * gb / ms
        share = f"{rate / result['read_gb_s']:.0%}"
        return (name, f"{ms:.3f}", f"{gb:.2f}", f"{rate:.0f}", share) if gb else (name, f"{ms:.3f}", "", "", "")

    speed, above = part["speed"], wrapped(result["device"]) + "\n\n"
    base, allowed = speed["vanilla"]["tokens_per_sec"], 1e3 * speed["eagle2"]["mean_gained"] / part["cycle_ms"]
    note = f"eagle2 reaches {part['efficiency']:.1%} of the {allowed:.1f} tokens/s that its captured cycle allows."
    head = (f"prompts of at most {part['context']} tokens", "tokens/s", "speed-up", "tokens a cycle", "ms a cycle")
    tables = [above + table(head, *((
        name, f"{s['tokens_per_sec']:.1f}", f"{s['tokens_per_sec'] / base:.2f}", f"{s['mean_gained']:.2f}",
        f"{s['cycle_ms']:.3f}") for name, s in speed.items())) + f"\n{wrapped(note)}\n", above + table(
        (f"after {part['timed_at']} tokens", "ms", "GB read", "GB/s", f"of {result['read_gb_s']:.0f} GB/s"),
        *(line(p["part"], p["ms"], p["gb"]) for p in part["parts"]),
        line("sum of these", part["sum_ms"], part["cycle_gb"]), line("cycle", part["cycle_ms"], part["cycle_gb"]),
        line("between two cycles (wall-clock)", part["between_ms"], 0),
        line("vanilla's cycle", part["vanilla_ms"], part["vanilla_gb"]),
        ("verify / vanilla", f"{part['verify_ratio']:.2f}", "", "", ""),
        ("cycle / vanilla", f"{part['cycle_ratio']:.2f}", "", "", ""))]
    if part["rows_ms"]:
        tables.append(above + table(("rows verified", *part["rows_ms"]),
                                    ("ms", *(f"{ms:.3f}" for ms in part["rows_ms"].values()))))
    return "\n".join(tables)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Time the parts of an EAGLE-2 cycle.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--draft", type=Path, help="draft head: its folder, or a file in it (default: <checkpoint>/eagle)")
    p.add_argument("--quantize", choices=MODES, help="quantise target and draft head, after widening")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--draft_vocab", type=int, help="draft only so many of the head's frequent tokens; 0: all")
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: as it is)")
    p.add_argument("--contexts", type=int, nargs="+", default=[512, 3500],
                   help="tokens of the prompts; 0: the questions alone")
    p.add_argument("--tree", type=tree_nodes, nargs="+", metavar="N", help="EAGLE-2's nodes, levels, top-k; or auto")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--questions", type=Path, default=QUESTIONS, help='JSON lines with "turns"; the first is asked')
    p.add_argument("--rounds", type=int, default=3, help="how often the methods take turns")
    p.add_argument("--rows", action="store_true", help="also time the verification of 1 to 64 nodes")
    p.add_argument("--startup", action="store_true", help="also time generate.py from its start to its first text")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, help="write all numbers to this file")
    args = p.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for wrong, message in (
            (args.max_new_tokens < 2 or args.rounds < 1, "--max_new_tokens must be 2 or more, --rounds 1 or more"),
            (args.startup and args.shape, "--startup is for a checkpoint as it is, without --shape"),
            (args.tree not in (None, ["auto"]) and (len(args.tree) != 3 or "auto" in args.tree),
             "--tree takes nodes, levels and top-k, or auto"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own")):
        if wrong:
            p.error(message)
    return args


def cycle(args: argparse.Namespace, result: dict) -> None:
    """Measure, print, and fill `result`."""
    def prompts_of(model: Llama, tokenizer: Tokenizer) -> list[Prompt]:
        questions = [question.turns[0] for question in read_questions(args.questions)]
        return [Prompt("", 1, str(n), ids) for n in args.contexts for ids in fill_context(tokenizer, questions, n)]

    device, n = torch.device(args.device), args.max_new_tokens
    result |= {"arguments": {name: str(value) for name, value in vars(args).items()}, "contexts": [],
               **bandwidth(device), "startup_s": startup(args) if args.startup else {}, "device": about(args)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # bandwidth is not counted, loading is
    subject = load(args, prompts_of)
    head = load_weights("eagle2", args, subject)["draft"]
    model, prompts, stop_ids, _ = subject
    del subject  # and with it the small model that was widened
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantising left behind; a quantised file leaves nothing
    slots = max(len(p.ids) for p in prompts) + n
    usual = GPU_TREE if device.type == "cuda" else CPU_TREE
    tree = args.tree or usual
    if args.tree == ["auto"]:
        curve = read_curve(args.draft or find_head(args.checkpoint))
        tree = fit(model, head, curve, slots, show=True) or usual
    engines = {"vanilla": Engine(model, Vanilla(device), slots, stop_ids),
               "eagle2": Engine(model, Eagle2(head, model, *tree), slots, stop_ids)}
    for context in args.contexts:
        result["contexts"].append(measure(engines, [p.ids for p in prompts if p.category == str(context)], args))
        print(report(result, result["contexts"][-1]), flush=True)
    result["memory_gb"] = peak_gb(device)
    row = {"GB/s of a sum": result["read_gb_s"], "of a copy, both ways": result["copy_gb_s"],
           "peak memory, GB": result["memory_gb"]}
    if device.type == "cuda":  # the CUDA context and all that the allocator keeps as well
        free, total = torch.cuda.mem_get_info()
        row["in use on the device, GB"] = result["device_gb"] = (total - free) / 1e9
    row |= {f"first text, {name} start, s": seconds for name, seconds in result["startup_s"].items()}
    print(wrapped(result["device"]), "", table(tuple(row), tuple(f"{x:.1f}" for x in row.values())), sep="\n")


def main() -> None:
    args, result = parse_args(), {}
    try:
        cycle(args, result)
    except (ValueError, OSError) as e:
        sys.exit(fail(e))
    finally:
        if args.json and result.get("contexts"):
            args.json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
