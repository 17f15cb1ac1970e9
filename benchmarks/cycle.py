"""Where the time of a cycle with a draft head goes: its parts, the bytes they read, what is lost between two cycles.

    python -m benchmarks.cycle --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --shape llama-2-7b --rows

With --shape the checkpoint is widened (benchmarks/widen.py): every weight of a 7B is read and multiplied, but the text
and the acceptance of drafts are the small model's.

Each part of a cycle is timed alone, on a GPU as a CUDA graph of its own between two events. For that the text is frozen
in the middle of a generation, so that a cycle repeats the same work. Tokens per second are wall-clock of whole
generations: greedy, without prefill, in turns with plain decoding.

Prints Markdown; --json FILE writes the same numbers and more (measure_all and measure_context list the keys). bench.py
compares all methods.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

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

from app.answer import Run, integers_of_head, run
from app.options import DTYPES, check_output
from benchmarks.environment import describe, environment
from benchmarks.report import parts_rows, table
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
from drafters.heads import tree_drafter
from drafters.methods import BASELINE, CPU_TREE, GPU_TREE, OPTIONS, WITH_TREES, head_path, number_or_auto
from drafters.tree_size import fastest_tree, read_curve, verify_by_rows
from engine import Engine
from formats.questions import read_questions
from formats.writing import write_text
from model import Llama
from ops.device import peak_gb
from ops.graphs import timed
from quant.linear import GROUPS, MODES
from tokenizer import Tokenizer

ROWS = (1, 8, 16, 32, 60, 64, 96, 128)  # that --rows times
QUESTIONS = Path(__file__).parent / "cycle_questions.jsonl"


# ----- Measuring ---------------------------------------------------------------------------------------------------


def bandwidth(device: torch.device) -> dict[str, float]:
    """The best GB/s of memory in five tries: of a sum, which reads, and of a copy, which reads and writes."""
    x = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)  # fp32: 2 GiB on a GPU, 256 MiB on a CPU
    y = torch.empty_like(x)
    gb = 4e-9 * len(x)
    read_ms = min(timed(x.sum, device, 1, 1) for _ in range(5))
    copy_ms = min(timed(partial(y.copy_, x), device, 1, 1) for _ in range(5))
    return {"read_gb_s": 1e3 * gb / read_ms, "copy_gb_s": 2e3 * gb / copy_ms}


@torch.inference_mode()
def cycle_parts(engine: Engine) -> list[dict]:
    """The parts of a frozen engine's cycle, in order, as {part, ms, gb}: name, time, and how many GB of weights,
    keys and values it reads."""
    state, drafter, model = engine.state, engine.drafter, engine.model
    length = int(state.length)
    parts = []

    def time_part(name: str, gb: float, function: Callable[[], object]) -> object:
        parts.append({"part": name, "ms": timed(function, engine.device), "gb": gb})
        return function()  # once more, outside of any CUDA graph: the next part reads the result

    inputs_gb, level_gb, next_gb = (gigabytes(*weights) for weights in drafter.bound.weights())
    level_gb += kv_gigabytes(drafter.head.kv, length)
    if isinstance(drafter, Eagle2):
        next_gb = [next_gb] * (drafter.levels - 1) + [0]  # of each level but the last
        scratch, inputs, level = time_part(f"draft: extend, {drafter.max_depth + 1} rows",
                                           inputs_gb + level_gb + next_gb[0], partial(drafter.begin, state))
        for depth in range(1, drafter.levels):
            inputs, level = time_part(
                f"draft: expansion {depth}, {drafter.topk} rows", level_gb + next_gb[depth],
                partial(drafter.expand, state, scratch, inputs, level, depth))
    else:
        time_part(f"draft: block, {drafter.rows} rows", inputs_gb + level_gb, partial(drafter.draft, state))
    tree = time_part("rerank", 0, partial(drafter.rerank, state))
    base = state.length - 1
    hidden, next_tokens = time_part(f"verify, {len(tree.tokens)} rows", step_gb(model, length),
                                      partial(engine.verify, base, tree))
    time_part("accept and compact", 0, partial(engine.commit, base, tree, hidden, next_tokens))
    return parts


def speed_of(rounds: list[list[Run]]) -> dict[str, float]:
    """Tokens per second, tokens per step and ms per cycle of rounds[i][j], prompt j in round i. All rounds write the
    same texts and differ only in their seconds, of which the median counts."""
    tokens = sum(sum(r.gained) for r in rounds[0])
    cycles = max(1, sum(len(r.gained) for r in rounds[0]))
    seconds = median(sum(r.decode_s for r in runs) for runs in rounds)
    return {"tokens_per_sec": tokens / seconds, "mean_gained": tokens / cycles, "cycle_ms": 1e3 * seconds / cycles}


def measure_context(engines: dict[str, Engine], prompts: list[list[int]], args: argparse.Namespace) -> dict:
    """All numbers of one context, an entry of result["contexts"]. `engines` are vanilla and --method. The keys:

    tree                          [nodes, levels, top-k] of the method
    context, timed_at             tokens of the longest prompt; length of the frozen text
    parts                         see cycle_parts
    sum_ms, cycle_ms, cycle_gb    the parts together; a whole cycle as one graph; GB that it reads
    between_ms                    a cycle of the generations, in wall-clock, less cycle_ms
    vanilla_ms, vanilla_gb        the same of vanilla's cycle
    verify_ratio, cycle_ratio     verification / vanilla's cycle, cycle / vanilla's cycle
    rows_ms                       {rows: ms of verifying them}, with --rows
    speed                         {"vanilla" and the method's name: see speed_of}
    texts                         the method's token ids
    efficiency                    tokens/s of the generations / tokens/s if a cycle took cycle_ms
    """
    vanilla, drafting = engines[BASELINE], engines[args.method]
    for engine in engines.values():  # compiling and capturing are not timed
        run(engine, prompts[0], args.max_new_tokens)
    rounds = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            rounds[name].append([run(engine, ids, args.max_new_tokens) for ids in prompts])
    speed = {name: speed_of(each) for name, each in rounds.items()}
    vanilla_length = freeze(vanilla, prompts[0], args.max_new_tokens // 2)
    vanilla_ms = timed(vanilla.cycle, vanilla.device, 1)
    vanilla_gb = step_gb(vanilla.model, vanilla_length)
    length = freeze(drafting, prompts[0], args.max_new_tokens // 2)
    parts = cycle_parts(drafting)
    cycle_ms = timed(drafting.cycle, drafting.device, 1)
    fast = speed[args.method]
    verify_ms = parts[-2]["ms"]
    drafter = drafting.drafter
    return {"tree": [drafter.num_nodes, drafter.max_depth, drafter.topk],
            "context": max(map(len, prompts)), "timed_at": length,
            "parts": parts, "sum_ms": sum(p["ms"] for p in parts), "cycle_ms": cycle_ms,
            "cycle_gb": sum(p["gb"] for p in parts), "between_ms": fast["cycle_ms"] - cycle_ms,
            "vanilla_ms": vanilla_ms, "vanilla_gb": vanilla_gb, "verify_ratio": verify_ms / vanilla_ms,
            "cycle_ratio": cycle_ms / vanilla_ms, "rows_ms": verify_by_rows(drafting, ROWS) if args.rows else {},
            "speed": speed, "texts": [r.tokens for r in rounds[args.method][0]],
            "efficiency": fast["tokens_per_sec"] * cycle_ms / 1e3 / fast["mean_gained"]}


def startup_seconds(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds from the start of a generate.py process to its first text, and the parts that it prints itself
    (ops/startup.py): {"cold", "warm"}, without and with compiled kernels and the best tree in the caches. The libraries
    are in the system's file cache both times: this process has read them."""
    command = [
        sys.executable, Path(__file__).parent.parent / "generate.py", "--checkpoint", args.checkpoint, "--method",
        args.method, "--prompt", "Why is the sky blue?", "--max_new_tokens", "8", "--json", "--device", args.device,
        "--dtype", args.dtype, *(["--draft", args.draft] if args.draft else []),
        *(["--draft_vocab", str(args.draft_vocab)] if args.draft_vocab is not None else []),
        *(["--draft_weights", args.draft_weights] if args.draft_weights else []),
        *(["--quantize", args.quantize] if args.quantize else []),
        *(["--group", str(args.group)] if args.group else [])]
    seconds = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            start = time.perf_counter()
            env = os.environ | {"TRITON_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
            with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
                child.stdout.read(1)
                first_text = time.perf_counter() - start
                rest = child.stdout.read()
            if child.returncode:
                raise ValueError(f"--startup: generate.py ended with exit code {child.returncode}")
            seconds[name] = {"first text": first_text, **json.loads(rest.splitlines()[-1])["start_s"]}
    return seconds


def measure_all(args: argparse.Namespace, result: dict) -> None:
    """Measure and print everything, and fill `result`, which --json writes. Its keys:

    arguments                {option: its value as a string}
    contexts                 [see measure_context], one for each of --contexts
    read_gb_s, copy_gb_s     see bandwidth
    startup_s                see startup_seconds; {} without --startup
    device                   the line above every table: device, versions, and what is measured
    memory_gb, device_gb     peak memory, on a GPU of the tensors, on a CPU of the process; memory in use on the GPU at
                             the end, with the CUDA context and all that the allocator keeps
    """
    def make_prompts(model: Llama, tokenizer: Tokenizer) -> list[Prompt]:
        questions = [question.turns[0] for question in read_questions(args.questions)]
        return [Prompt("", 1, str(n), ids) for n in args.contexts for ids in fill_context(tokenizer, questions, n)]

    device = torch.device(args.device)
    result |= {"arguments": {name: str(value) for name, value in vars(args).items()}, "contexts": [],
               **bandwidth(device), "startup_s": startup_seconds(args) if args.startup else {},
               "device": f"{describe(environment(device))}, {describe_subject(args)}"}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # leave out what bandwidth() took; loading counts
    subject = load(args, make_prompts)
    [head] = load_weights(args.method, args, subject).values()
    model, prompts, stop_ids = subject[:3]
    del subject  # with --shape it keeps the small model alive
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what quantising on load left behind; a quantised file leaves nothing
    slots = max(len(p.ids) for p in prompts) + args.max_new_tokens
    default = GPU_TREE if device.type == "cuda" else CPU_TREE
    tree = args.tree or default
    if args.tree == ["auto"]:
        curve = read_curve(head_path(args, args.method))
        tree = fastest_tree(model, head, curve, slots, show=True) or default
    engines = {BASELINE: Engine(model, Vanilla(device), slots, stop_ids),
               args.method: Engine(model, tree_drafter(head, model, *tree), slots, stop_ids)}
    if head_format := integers_of_head(engines[args.method]):
        result["device"] += f" The draft head is in {head_format}."
    for n in args.contexts:
        context = measure_context(engines, [p.ids for p in prompts if p.category == str(n)], args)
        result["contexts"].append(context)
        print(context_report(result, context), flush=True)
    result["memory_gb"] = peak_gb(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        result["device_gb"] = (total - free) / 1e9
    print(last_table(result))


# ----- Printing ----------------------------------------------------------------------------------------------------


def fill_lines(text: str) -> str:
    """The text in lines of at most 100 characters."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def context_report(result: dict, context: dict) -> str:
    """The tables of one context, each below the line that says what it is of."""
    tables = [speed_table(context), parts_table(context, result["read_gb_s"])]
    if context["rows_ms"]:
        tables.append(table(("rows verified", *context["rows_ms"]),
                            ("ms", *(f"{ms:.3f}" for ms in context["rows_ms"].values()))))
    return "\n".join(f"{fill_lines(result['device'])}\n\n{each}" for each in tables)


def speed_table(context: dict) -> str:
    speed = context["speed"]
    base = speed[BASELINE]["tokens_per_sec"]
    heading = (f"prompts of at most {context['context']} tokens", "tokens/s", "speed-up", "tokens per step",
               "ms per cycle")
    rows = [(name, f"{s['tokens_per_sec']:.1f}", f"{s['tokens_per_sec'] / base:.2f}", f"{s['mean_gained']:.2f}",
             f"{s['cycle_ms']:.3f}") for name, s in speed.items()]
    method = list(speed)[-1]
    allowed = 1e3 * speed[method]["mean_gained"] / context["cycle_ms"]
    note = f"{method} reaches {context['efficiency']:.1%} of the {allowed:.1f} tokens/s that its captured cycle allows."
    return f"{table(heading, *rows)}\n{fill_lines(note)}\n"


def parts_table(context: dict, read_gb_s: float) -> str:
    return table(*parts_rows(context, read_gb_s),
                 ("verify / vanilla", f"{context['verify_ratio']:.2f}", "", "", ""),
                 ("cycle / vanilla", f"{context['cycle_ratio']:.2f}", "", "", ""))


def last_table(result: dict) -> str:
    """What does not depend on the context: bandwidth, memory and start-up."""
    row = {"GB/s of a sum": result["read_gb_s"], "of a copy, both ways": result["copy_gb_s"],
           "peak memory, GB": result["memory_gb"]}
    if "device_gb" in result:
        row["in use on the device, GB"] = result["device_gb"]
    said = f"{fill_lines(result['device'])}\n\n{table(tuple(row), tuple(f'{x:.1f}' for x in row.values()))}"
    if result["startup_s"]:
        names = list(dict.fromkeys(name for seconds in result["startup_s"].values() for name in seconds))
        said += "\n" + table(("start, s", *names), *(
            (start, *(f"{seconds.get(name, 0):.2f}" for name in names))
            for start, seconds in result["startup_s"].items()))
    return said


# ----- The command -------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser("python -m benchmarks.cycle", description="Time the parts of a cycle.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--method", choices=WITH_TREES, default=WITH_TREES[0], help="default: %(default)s")
    p.add_argument("--draft", type=Path, help="draft head: its folder, or a file in it (default: the folder eagle, "
                   "eagle3 or block of the checkpoint, as --method says)")
    p.add_argument("--quantize", choices=MODES, help="quantise target and draft head, after widening")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--draft_vocab", type=int, help="draft only this many of the head's most frequent tokens, and "
                   "the prompt's own; 0: all")
    p.add_argument("--draft_weights", **OPTIONS["draft_weights"])
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: do not widen)")
    p.add_argument("--contexts", type=int, nargs="+", default=[512, 3500],
                   help="lengths of the prompts in tokens; 0: the questions alone (default: 512 3500)")
    p.add_argument("--tree", type=number_or_auto, nargs="+", metavar="N", help="nodes, levels and top-k; or auto")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--questions", type=Path, default=QUESTIONS,
                   help='JSON lines with "turns"; only the first turn is asked')
    p.add_argument("--rounds", type=int, default=3, help="how often the two methods take turns (default: 3)")
    p.add_argument("--rows", action="store_true", help="also time the verification of 1 to 128 nodes")
    p.add_argument("--startup", action="store_true", help="also time generate.py from its start to its first text")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    args = p.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    for wrong, message in (
            (args.max_new_tokens < 2 or args.rounds < 1, "--max_new_tokens must be 2 or more, --rounds 1 or more"),
            (args.startup and args.shape, "--startup runs generate.py, which does not widen: leave out --shape"),
            (args.tree not in (None, ["auto"]) and (len(args.tree) != 3 or "auto" in args.tree),
             "--tree takes nodes, levels and top-k, or auto"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own"),
            (wrong_json := check_output(args, "json"), wrong_json)):
        if wrong:
            p.error(message)
    return args


def main() -> None:
    args = parse_args()
    result = {}
    try:
        measure_all(args, result)
    finally:
        if args.json and result.get("contexts"):
            write_text(args.json, json.dumps(result) + "\n")


if __name__ == "__main__":
    run_command(main)
