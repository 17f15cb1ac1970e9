"""Generate text with a Llama, one sequence on one device, as fast as it goes; with EAGLE-2 the same text faster.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --compare \\
        --prompt "Write a Python class for a queue."

This file is the command line; engine.py decodes. Weights of 8 or 4 bits: --checkpoint DIR/model-int8.safetensors, which
quantize.py writes, or --quantize int8.

Text goes to stdout as it is written, statistics to stderr; with --json the last line of stdout is one object.
"""
import argparse
import json
import os
import sys
from pathlib import Path

from app import memory
from app.answer import compare, generate, report
from app.batch import batch
from app.draw_tree import page
from app.options import DTYPES, Engine, add_options, check_engine, context, fail, load_engine, placement
from app.trace import write_trace
from app.watch import View, Watch, watch
from draft import Vanilla
from formats.config import Config
from formats.eagle import folder_of
from sampling import Sampling
from tokenizer import Tokenizer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Generate text, with or without EAGLE-2.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    method = p.add_mutually_exclusive_group()
    method.add_argument("--eagle2", action="store_true", help="draft with EAGLE-2's dynamic tree")
    method.add_argument("--eagle", action="store_true", help="draft with EAGLE's fixed tree")
    method.add_argument("--medusa", type=Path, metavar="DIR", help="draft with these Medusa heads")
    method.add_argument("--speculate", type=Path, metavar="DIR", help="draft with a smaller model of the same tokens")
    method.add_argument("--lookahead", action="store_true", help="draft with n-grams from Jacobi iterations")
    p.add_argument("--lookup", action="store_true", help="draft what the text itself suggests; with --eagle2 beside "
                   "its tree, with --speculate to speed up the draft model")
    p.add_argument("--rejection", action="store_true", help="--speculate: the papers' rule when sampling; more is "
                   "accepted, but the same seed no longer gives the text of plain decoding")
    add_options(p)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text, - for stdin, or @FILE")
    source.add_argument("--interactive", action="store_true", help="chat; from a pipe, every line is a turn")
    source.add_argument("--prompt_file", type=Path, metavar="FILE", help='many prompts: JSON lines with "prompt", '
                        '"messages" or "turns" (batch.py)')
    p.add_argument("--output", type=Path, metavar="FILE", help="of --prompt_file: the answers, one a line; those "
                   "that are there already are kept")
    p.add_argument("--system", metavar="TEXT", help="--interactive: begin with this system message")
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    p.add_argument("--max_new_tokens", type=int, help="default: 256, of each answer of a chat 1024")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top_k", type=int, default=0, help="0: off")
    p.add_argument("--top_p", type=float, default=1.0, help="1: off")
    p.add_argument("--min_p", type=float, default=0.0, help="0: off")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same text with any drafter")
    p.add_argument("--compare", action="store_true", help="run vanilla too and compare speed and tokens")
    p.add_argument("--tree_table", action="store_true", help="--draft_tokens auto, and show what it compared")
    p.add_argument("--show_tree", action="store_true", help="print every cycle's tree (its time counts as decoding)")
    p.add_argument("--tree_html", type=Path, metavar="FILE", help="write a page that steps through the cycles' trees")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the device is fast at it")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    p.add_argument("--max_seq_len", type=int, help="cache slots (default: the model's context, at most 4096)")
    p.add_argument("--no_compile", action="store_true", help="no CUDA graphs: launch every kernel from Python")
    p.add_argument("--profile", type=Path, metavar="FILE", help="then write a Chrome trace of a few cycles")
    p.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    args = p.parse_args(argv)
    drafts = [name for name in ("eagle2", "eagle", "medusa", "speculate", "lookahead") if getattr(args, name)]
    args.method = "+".join(drafts + [name for name in ("lookup", "rejection") if getattr(args, name)]) or "vanilla"
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if args.interactive else 256
    wrong = check_engine(args) or check_run(args)
    if wrong:
        p.error(wrong)
    return args


def check_run(args: argparse.Namespace) -> str | None:
    """What is wrong with what the engine is asked to do, if anything."""
    for option in ("output", "profile", "tree_html"):  # before the run, not after it
        path = getattr(args, option)
        if path and (path.is_dir() or not path.parent.is_dir()):
            return f"--{option} {path}: " + ("a folder, not a file" if path.is_dir() else "there is no such folder")
    for wrong, message in (
            (args.compare and args.method == "vanilla", "--compare needs a method that drafts, such as --eagle2"),
            ((args.show_tree or args.tree_html) and args.method == "vanilla",
             "--show_tree and --tree_html need a method that drafts, such as --eagle2"),
            (bool(args.prompt_file) != bool(args.output), "--prompt_file and --output FILE go together"),
            (args.prompt is None and (args.compare or args.json or args.profile or args.tree_html),
             "--compare, --json, --profile and --tree_html are for a single --prompt"),
            (args.prompt_file and args.show_tree, "--show_tree is not for --prompt_file"),
            (args.interactive and args.raw, "--interactive is without --raw"),
            (args.system and not args.interactive, "--system is for --interactive"),
            ("" in args.stop, "--stop must not be empty"),
            (args.stop and (args.show_tree or args.tree_html), "--show_tree and --tree_html are without --stop"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (not 0 <= args.temperature < float("inf"), "--temperature must be 0 or more"),
            (args.temperature == 0 and (args.top_k, args.top_p, args.min_p) != (0, 1.0, 0.0),
             "--top_k, --top_p and --min_p need a --temperature above 0"),
            (args.top_k < 0 or not 0 < args.top_p <= 1 or not 0 <= args.min_p <= 1,
             "--top_k must be 0 or more, --top_p in (0, 1], --min_p in [0, 1]"),
            (not -2**63 <= args.seed < 2**63, "--seed must fit 64 bits")):
        if wrong:
            return message
    return None


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.prompt.startswith("@"):
        text = Path(args.prompt[1:]).read_text(encoding="utf-8")
    else:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise ValueError("--prompt is empty")
    if args.raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    return tokenizer.chat([{"role": "user", "content": text}])


def main() -> None:
    args = parse_args()
    try:
        work(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        sys.exit(141)
    except RuntimeError as e:
        if not memory.exhausted(e):
            raise
        slots = context(args, Config.load(folder_of(args.checkpoint)))
        sys.exit(fail(MemoryError(memory.advice(args, *placement(args), slots))))


def work(args: argparse.Namespace) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    try:
        if args.prompt_file:
            sys.exit(batch(args, sampling))
        engine = load_engine(args)
        tokenizer = engine.tokenizer
        if args.show_tree or args.tree_html:
            watch(engine)
        if args.interactive:
            from app.chat import chat  # prompt_toolkit takes its time to load
            return chat(engine, tokenizer, sampling, args.max_new_tokens, args.system, args.stop)
        ids = read_prompt(args, tokenizer)
        engine.check(ids)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as e:
        sys.exit(fail(e))
    engine.warm_up(sampling)
    view = View(engine.drafter, tokenizer, args.show_tree) if isinstance(engine.drafter, Watch) else None
    result = generate(engine, ids, args.max_new_tokens, sampling, tokenizer, args.method, not args.show_tree, args.stop,
                      view)
    print(report(result), file=sys.stderr)
    if args.compare:
        plain = Engine(engine.model, Vanilla(engine.device), engine.max_seq_len, tokenizer.stop_ids,
                       not args.no_compile)
        plain.warm_up(sampling)
        result["vanilla"] = generate(plain, ids, args.max_new_tokens, sampling, tokenizer, stops=args.stop)
        result["identical"] = result["tokens"] == result["vanilla"]["tokens"]
        print(report(result["vanilla"]), compare(plain, result["vanilla"], result, ids), sep="\n", file=sys.stderr)
    if args.json:
        print(json.dumps(result))
    try:
        if args.tree_html:
            page(result, args.tree_html)
        if args.profile:
            print(write_trace(engine, ids, sampling, args.profile), file=sys.stderr)
    except OSError as e:
        sys.exit(fail(e))


if __name__ == "__main__":
    main()
