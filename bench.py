"""The shootout: every method in one engine, on one model, by one clock and one counter of tokens.

    python bench.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --methods vanilla,eagle,eagle2 \\
        --temperature 0 1 --json out.json --plots pictures

All methods answer the same prompts (later turns hold the model's own answers to the earlier ones) and take turns, A B
C A B C, so that a warmer GPU meets them all. Speeds are all tokens / all seconds of a run over the prompts, the median
and quartiles of --runs; compilation and capture come before. What counts, everywhere: tokens committed after prefill,
up to the stop id; tokens a cycle are these / verifications, the bonus token included. Each text is compared with plain
decoding's at the same temperature and seed. --shape (widen.py) has the cost of a 7B and the text of a small model.

Prints Markdown (report.py); --json FILE writes all numbers and ids, --against OLD.json compares with such a file,
--plots DIR draws (plots.py). Ctrl-C reports the runs that are complete. The parts of one cycle in detail: cycle.py.
"""
import argparse
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from app.answer import Run, run
from app.options import DTYPES, add_method_options, check_methods, fail
from benchmarks.engines import gpt_fast_decoder, transformers_decoder
from benchmarks.environment import environment
from benchmarks.race import FAILURES, Method, complain, race, split_cycle, summary
from benchmarks.report import against, read_result, report
from benchmarks.widen import SHAPES
from benchmarks.workload import Prompt, Subject, ask, describe_subject, load, load_weights
from drafters.methods import BASELINE, METHODS, make_drafter
from engine import SPARE, Engine
from formats.questions import read_questions
from ops.device import peak_gb
from sampling import Sampling

DEFAULT = ["lookup", "lookahead", "eagle", "eagle2", "eagle2+lookup"]  # those that need no further weights
QUESTIONS = Path(__file__).parent / "benchmarks/questions.jsonl"
NO_SETTINGS = ("methods", "temperature", "json", "against", "plots")  # which --against does not compare


def prepare(args: argparse.Namespace, result: dict) -> tuple[dict[str, Method], list[Prompt]]:
    """Load everything, and let happen what happens once: compilation, capture. A method that fails is left out."""
    new_tokens, questions = args.max_new_tokens, read_questions(args.questions)
    subject = load(args, lambda model, tokenizer: ask(model, tokenizer, questions, new_tokens))
    model, prompts, stop = subject[:3]
    result["prompts"] = [p._asdict() for p in prompts]
    longest = max((p.ids for p in prompts), key=len)
    slots = len(longest) + new_tokens
    model.allocate_cache(slots, SPARE)  # the target's: nobody's own memory
    makers = {name: partial(our_method, name, args, subject, slots) for name in args.methods}
    makers |= {f"transformers, {cache} cache (greedy)": lambda cache=cache: other_method(
        transformers_decoder(model, stop, cache)) for cache in ("dynamic", "static") if args.transformers}
    if args.gpt_fast:
        makers["gpt-fast (greedy)"] = lambda: other_method(gpt_fast_decoder(model, stop, args.gpt_fast))
    methods = {}
    for name, make in tqdm(makers.items(), "prepare", leave=False, disable=None):
        before, start = torch.cuda.memory_allocated(), time.perf_counter()  # without a GPU: 0
        try:
            method = make()
            temperatures = args.temperature if method.engine else [0.0]
            for t in temperatures:
                if method.engine:
                    method.engine.warm_up(Sampling(t))
                method.decode(longest, new_tokens, Sampling(t))  # others compile for the longest text
            known = {"prepare_s": time.perf_counter() - start}
            if method.engine:
                drafter, own = method.engine.drafter, torch.cuda.memory_allocated() - before
                known |= {"nodes": drafter.num_nodes, "max_depth": drafter.max_depth,
                          "rejection": drafter.rejection_sampling, "own_gb": own / 1e9 or None, "split_ms": {
                              str(t): split_cycle(method.engine, prompts[0].ids, new_tokens, t) for t in temperatures}}
            methods[name], result["methods"][name] = method, known
        except FAILURES as error:
            complain(result, name, error)
    if BASELINE not in methods:
        raise ValueError(f"vanilla, which all are compared with, failed: {result['failed'][BASELINE]}")
    return methods, prompts


def our_method(name: str, args: argparse.Namespace, subject: Subject, slots: int) -> Method:
    """With weights of its own, even where another method drafts with the same: so it is known what each takes."""
    drafter = make_drafter(name, args, subject.model, slots, load_weights(name, args, subject))
    engine = Engine(subject.model, drafter, slots, subject.stop_ids)
    return Method(partial(run, engine), engine)


def other_method(decode: Callable[[list[int], int], Run]) -> Method:
    return Method(lambda ids, new_tokens, sampling: decode(ids, new_tokens))


def bench(args: argparse.Namespace, result: dict) -> None:
    """Measure and fill `result`."""
    device = torch.device(args.device)
    result |= {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
               "note": f"{args.checkpoint.name}, batch 1, {describe_subject(args)}",
               "settings": {k: str(v) for k, v in vars(args).items() if k not in NO_SETTINGS},
               "methods": {}, "failed": {}, "measured": [], "before": environment(device)}
    methods, prompts = prepare(args, result)
    vanilla = methods[BASELINE].engine
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # with --shape, loading takes more than all the rest
    result["before"] = environment(device)  # the clocks of a warm GPU
    runs = race(methods, prompts, args, result)
    result |= {"after": environment(device), "memory_gb": peak_gb(device)}
    result["measured"] = [summary(name, t, each, prompts, vanilla, result["methods"][name])
                          for t, each in runs.items() for name in each]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Compare methods of decoding.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--methods", type=lambda text: text.split(","), default=DEFAULT, metavar="A,B",
                   help=f"vanilla, which always runs, and any of {', '.join(METHODS)} (default: {','.join(DEFAULT)})")
    add_method_options(p)
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="one or more; 0: greedy (the default)")
    p.add_argument("--runs", type=int, default=5, help="how often the methods take turns (default: 5)")
    p.add_argument("--questions", type=Path, default=QUESTIONS,
                   help='JSON lines with "turns", perhaps "category" and "question_id": those of Spec-Bench, MT-bench')
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: as it is)")
    p.add_argument("--transformers", action="store_true", help="also transformers, with its two kinds of cache; greedy")
    p.add_argument("--gpt_fast", type=Path, metavar="CLONE", help="also gpt-fast, greedy: the folder of its clone")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and ids to this file")
    p.add_argument("--against", type=Path, metavar="OLD.json", help="compare with what --json wrote earlier")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures into this folder")
    args = p.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.methods = list(dict.fromkeys([BASELINE, *args.methods]))
    args.temperature = list(dict.fromkeys(args.temperature))
    others = args.transformers or args.gpt_fast
    of_methods = check_methods(args, args.methods)
    for wrong, message in (
            (args.max_new_tokens < 2 or args.runs < 1, "--max_new_tokens must be 2 or more, --runs 1 or more"),
            (not all(0 <= t < float("inf") for t in args.temperature), "--temperature must be 0 or more"),
            (of_methods, of_methods),
            (others and args.quantize, "other engines run without --quantize"),
            (others and 0 not in args.temperature, "other engines are greedy: add --temperature 0"),
            (args.gpt_fast and not (args.gpt_fast / "model.py").is_file(), f"--gpt_fast {args.gpt_fast}: no model.py "
             "there; clone github.com/meta-pytorch/gpt-fast and check out 32971d3"),
            *((flag and not importlib.util.find_spec(name), f"--{option}: {name} is not installed; pip install -r "
               "requirements-dev.txt") for flag, option, name in (
                   (args.transformers, "transformers", "transformers"), (args.plots, "plots", "matplotlib"))),
            (args.json and not args.json.parent.is_dir(), f"--json {args.json}: there is no such folder")):
        if wrong:
            p.error(message)
    return args


def main() -> int:
    args, result = parse_args(), {"measured": []}
    try:
        old = args.against and read_result(args.against)
        bench(args, result)
    except (ValueError, OSError) as e:
        return fail(e)
    except KeyboardInterrupt:
        result["interrupted"] = "all of it"
    if result["measured"]:
        print(report(result))
        if old:
            print(against(old, result))
    if result.get("methods"):
        if args.json:
            args.json.write_text(json.dumps(result) + "\n")
        if args.plots and result["measured"]:
            from benchmarks.plots import draw  # here: nothing else needs matplotlib
            print("pictures:", *draw(result, args.plots))
    if "interrupted" in result:
        print(f"interrupted; missing: {result['interrupted']}", file=sys.stderr)
        return 130
    return 0 if result["measured"] else 2


if __name__ == "__main__":
    sys.exit(main())
