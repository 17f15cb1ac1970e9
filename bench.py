"""The shootout: every method in one engine, on one model, with one clock and one way to count tokens.

    python bench.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --methods vanilla,eagle,eagle2 \\
        --temperature 0 1 --json out.json --plots pictures

All methods answer the same prompts; later turns hold the model's own answers to the earlier ones. The methods take
turns, A B C A B C, so that a GPU that warms up slows all of them. The speed of a run is all of its tokens / all of its
seconds; printed are the median and quartiles of --runs. Compiling and capturing happen before.

Counted are tokens committed after prefill, up to the stop id. Tokens per step are these / verifications, the bonus
token included. Each text is compared with plain decoding's at the same temperature and seed. --shape measures the cost
of a 7B with the text of a small model (benchmarks/widen.py). --endpoint NAME=URL lets a server with OpenAI's API take
its turns too (benchmarks/http_engines.py).

Prints Markdown (benchmarks/report.py). --json FILE writes all numbers and ids; benchmarks/race.py lists its keys.
--against OLD.json compares with such a file, and so does `bench.py compare A.json B.json`; `bench.py card A.json` is
short, to paste elsewhere. --plots DIR draws (benchmarks/plots.py). Ctrl-C reports the runs that are complete.
benchmarks/cycle.py times the parts of one cycle in detail.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from app.answer import integers_of_head
from app.options import DTYPES, add_method_options, check_methods, check_output
from benchmarks.card import card
from benchmarks.contestants import makers, set_up
from benchmarks.environment import environment
from benchmarks.http_engines import read_endpoint, with_model
from benchmarks.race import FAILURES, Contestant, race, record_failure, summarise
from benchmarks.report import compare_results, read_result, report
from benchmarks.result_files import DAMAGED
from benchmarks.widen import SHAPES
from benchmarks.workload import Prompt, ask, describe_subject, load
from drafters.methods import BASELINE, METHODS
from engine import SPARE
from formats.questions import read_questions
from formats.writing import write_text
from ops.device import peak_gb
from sampling import Sampling
from tokenizer import Tokenizer

DEFAULT = ["lookup", "lookahead", "eagle", "eagle2", "eagle2+lookup"]  # need no weights besides the EAGLE head
QUESTIONS = Path(__file__).parent / "benchmarks/questions.jsonl"
NOT_COMPARED = ("methods", "temperature", "json", "against", "plots")  # options that --against ignores


def prepare(args: argparse.Namespace, result: dict) -> tuple[dict[str, Contestant], list[Prompt], Tokenizer]:
    """Load the model, make the prompts, and set up all contestants. One that fails is left out."""
    questions = read_questions(args.questions)
    subject = load(args, lambda model, tokenizer: ask(model, tokenizer, questions, args.max_new_tokens))
    prompts = subject.prompts
    result["prompts"] = [p._asdict() for p in prompts]
    slots = max(len(p.ids) for p in prompts) + args.max_new_tokens
    subject.model.allocate_cache(slots, SPARE)  # before any method's memory is measured: the cache is the target's
    contestants = {}
    for name, make in tqdm(makers(args, subject, slots).items(), "prepare", leave=False, disable=None):
        try:
            contestants[name], result["methods"][name] = set_up(make, prompts, args)
        except FAILURES as error:
            record_failure(result, name, error)
    if BASELINE not in contestants:
        raise ValueError(f"{BASELINE} failed, and all others are compared with it: {result['failed'][BASELINE]}")
    return contestants, prompts, subject.tokenizer


def bench(args: argparse.Namespace, result: dict) -> None:
    """Measure everything and fill `result`."""
    device = torch.device(args.device)
    args.endpoint = [with_model(endpoint) for endpoint in args.endpoint]  # before anything that takes long
    result |= {"command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
               "note": f"{args.checkpoint.name}, batch 1, {describe_subject(args)}",
               "settings": {k: str(v) for k, v in vars(args).items() if k not in NOT_COMPARED},
               "endpoints": {e.name: {"url": e.url, "model": e.model, "prompts": e.prompts} for e in args.endpoint},
               "methods": {}, "failed": {}, "measured": [], "before": environment(device)}
    contestants, prompts, tokenizer = prepare(args, result)
    vanilla = contestants[BASELINE].engine
    formats = {contestant.engine and integers_of_head(contestant.engine) for contestant in contestants.values()}
    if formats := formats - {None}:
        result["note"] += f" Draft heads are in {' and '.join(sorted(formats))}."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # with --shape, loading takes more than all the rest
    result["before"] = environment(device)  # again, now with the clocks of a warm GPU
    runs = race(contestants, prompts, args, result)
    result |= {"after": environment(device), "memory_gb": peak_gb(device)}
    result["measured"] = [summarise(name, t, by_method, prompts, vanilla, result["methods"][name], tokenizer)
                          for t, by_method in runs.items() for name in by_method]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Compare methods of decoding.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--methods", type=lambda text: text.split(","), default=DEFAULT, metavar="A,B",
                   help=f"any of {', '.join(METHODS)}; {BASELINE} always runs (default: {','.join(DEFAULT)})")
    add_method_options(p)
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0], help="one or more; 0: greedy (the default)")
    p.add_argument("--runs", type=int, default=5, help="how often the methods take turns (default: 5)")
    p.add_argument("--questions", type=Path, default=QUESTIONS, help='JSON lines with "turns" and, if you like, '
                   '"category" and "question_id", as Spec-Bench and MT-bench have them')
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: do not widen)")
    p.add_argument("--transformers", action="store_true", help="also transformers, with its two kinds of cache; greedy")
    p.add_argument("--gpt_fast", type=Path, metavar="CLONE", help="also gpt-fast, greedy: the folder of its clone")
    p.add_argument("--llamacpp", type=Path, metavar="FILE.gguf", help="also llama.cpp with this file, greedy, on a CPU")
    p.add_argument("--endpoint", type=read_endpoint, action="append", default=[], metavar="NAME=URL",
                   help="also a server with OpenAI's API, greedy; may be given several times. After the URL may come "
                   ",model=NAME ,key=@FILE and ,prompts=chat: texts for its own template instead of our token ids")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and ids to this file")
    p.add_argument("--against", type=Path, metavar="OLD.json", help="compare with what --json wrote earlier")
    p.add_argument("--plots", type=Path, metavar="DIR", help="draw pictures into this folder")
    args = p.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.methods = list(dict.fromkeys([BASELINE, *args.methods]))
    args.temperature = list(dict.fromkeys(args.temperature))
    wrong = check(args)
    if wrong:
        p.error(wrong)
    return args


def check(args: argparse.Namespace) -> str | None:
    """What is wrong with the options, if anything."""
    sharing = args.transformers or args.gpt_fast  # these use our weights
    others = sharing or args.llamacpp or args.endpoint
    names = [e.name for e in args.endpoint]
    for wrong, message in (
            (args.max_new_tokens < 2 or args.runs < 1, "--max_new_tokens must be 2 or more, --runs 1 or more"),
            (wrong_methods := check_methods(args, args.methods), wrong_methods),
            (sharing and args.quantize, "other engines run without --quantize"),
            (others and 0 not in args.temperature, "other engines are greedy: add --temperature 0"),
            (args.endpoint and args.shape, "--endpoint is without --shape: its model is not widened"),
            (len({*names, *METHODS}) < len(names) + len(METHODS), "--endpoint: each needs a NAME of its own"),
            (args.llamacpp and (args.shape or args.device != "cpu"), "--llamacpp is for --device cpu, without --shape"),
            (args.llamacpp and not args.llamacpp.is_file(), f"--llamacpp {args.llamacpp}: there is no such file"),
            (args.gpt_fast and not (args.gpt_fast / "model.py").is_file(), f"--gpt_fast {args.gpt_fast}: no model.py "
             "there; clone github.com/meta-pytorch/gpt-fast and check out 32971d3"),
            (args.plots and args.plots.is_file(), f"--plots {args.plots}: a file, where a folder should be"),
            (wrong_json := check_output(args, "json"), wrong_json)):
        if wrong:
            return message
    try:
        for temperature in args.temperature:
            Sampling(temperature)
    except ValueError as error:
        return f"--{error}"
    for option, package in (("transformers", "transformers"), ("plots", "matplotlib"), ("llamacpp", "xllamacpp")):
        if getattr(args, option) and not importlib.util.find_spec(package):
            return f"--{option}: {package} is not installed; pip install {package}"
    return None


def reread(argv: list[str]) -> int:
    """`bench.py compare A.json B.json` and `bench.py card A.json`."""
    p = argparse.ArgumentParser(prog="bench.py", description="Compare two files of --json, or show one as a card.")
    commands = p.add_subparsers(dest="what", required=True)
    for what, count in (("compare", 2), ("card", 1)):
        commands.add_parser(what).add_argument("files", type=Path, nargs=count, metavar="FILE.json")
    args = p.parse_args(argv)
    results = [read_result(file) for file in args.files]
    try:
        print(compare_results(*results) if args.what == "compare" else card(*results))
    except DAMAGED:
        raise ValueError(f"{args.files[0]}: not what bench.py --json writes") from None
    return 0


def main() -> int:
    if sys.argv[1:2] in (["compare"], ["card"]):
        return reread(sys.argv[1:])
    args = parse_args()
    result = {"measured": []}
    old = read_result(args.against) if args.against else None
    try:
        bench(args, result)
    except KeyboardInterrupt:
        result["interrupted"] = "everything"
    if args.json and result.get("methods"):  # before anything is printed, which fails where nobody reads
        write_text(args.json, json.dumps(result) + "\n")
    if result["measured"]:
        print(report(result))
        if old:
            print(compare_results(old, result))
        if args.plots:
            from benchmarks.plots import draw  # here: nothing else needs matplotlib
            print("pictures:", *draw(result, args.plots))
    if "interrupted" in result:
        print(f"interrupted; missing: {result['interrupted']}", file=sys.stderr)
        return 130
    return 0 if result["measured"] else 2


if __name__ == "__main__":
    run_command(main)
