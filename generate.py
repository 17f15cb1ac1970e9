"""Generate text with a Llama: one sequence, one device, as fast as it goes. With EAGLE-2 the same text, faster.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --compare \\
        --prompt "Write a Python class for a queue."

This file is the command line; engine.py decodes. For 8- or 4-bit weights give a file that quantize.py wrote
(--checkpoint DIR/model-int8.safetensors), or --quantize int8.

The text goes to stdout as it is written, statistics go to stderr. With --json the last line of stdout is one object.
"""
from app.command import before_imports, fail, run_command

if __name__ == "__main__":
    before_imports(gpu=True)

import argparse
import sys
from pathlib import Path

from app import memory
from app.answer import answer_and_report
from app.batch import batch
from app.draw_tree import write_page
from app.options import (
    Engine,  # noqa: F401  (`from generate import Engine`: README)
    add_device_options,
    add_method_flags,
    add_method_options,
    check_engine,
    check_output,
    context,
    explain_template,
    flagged_method,
    load_engine,
    placement,
    read_prompt,
)
from app.streams import as_utf8
from app.trace import write_trace
from app.watch import watch
from drafters.methods import BASELINE
from formats.config import Config
from formats.eagle import folder_of
from sampling import Sampling


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Generate text, with or without drafting.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text, - for stdin, or @FILE")
    source.add_argument("--interactive", action="store_true", help="chat; from a pipe, every line is a turn")
    source.add_argument("--prompt_file", type=Path, metavar="FILE", help='many prompts: JSON lines with "prompt", '
                        '"messages" or "turns" (app/batch.py)')
    source.add_argument("--serve", nargs="?", const="127.0.0.1:8000", metavar="HOST:PORT", help="answer requests in "
                        "OpenAI's format (docs/usage.md; default: %(const)s)")
    source.add_argument("--memory", action="store_true", help="print how much memory this would take, and stop")
    p.add_argument("--output", type=Path, metavar="FILE", help="with --prompt_file: the answers, one a line; answers "
                   "that are in the file already are kept")
    p.add_argument("--api_key", metavar="KEY", help="with --serve: the key that clients must send, or @FILE")

    methods = p.add_argument_group("how to draft (one of these, or --method NAME)")
    add_method_flags(methods)
    add_method_options(p, besides=("medusa", "speculate"))

    text = p.add_argument_group("the text")
    text.add_argument("--max_new_tokens", type=int, help="default: 256; with --interactive and --serve 1024")
    text.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    text.add_argument("--top_k", type=int, default=0, help="0: off")
    text.add_argument("--top_p", type=float, default=1.0, help="1: off")
    text.add_argument("--min_p", type=float, default=0.0, help="0: off")
    text.add_argument("--seed", type=int, default=0, help="the same seed gives the same text with any "
                      "drafter, except --speculate --rejection")
    text.add_argument("--stop", type=as_utf8, action="append", default=[], metavar="TEXT",
                      help="end before this text; repeatable")
    text.add_argument("--system", type=as_utf8, metavar="TEXT", help="with --interactive: the first system message")
    text.add_argument("--chat_template", type=Path, metavar="FILE",
                      help="a chat template (Jinja) in place of the checkpoint's (docs/usage.md)")
    text.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")

    look = p.add_argument_group("looking at it")
    look.add_argument("--compare", action="store_true", help="run vanilla too and compare speed and tokens")
    look.add_argument("--show_tree", action="store_true", help="print every cycle's tree (its time counts as decoding)")
    look.add_argument("--tree_html", type=Path, metavar="FILE", help="write a page that steps through the trees")
    look.add_argument("--profile", type=Path, metavar="FILE", help="write a Chrome trace of a few cycles")
    look.add_argument("--json", action="store_true", help="end stdout with one line of JSON")

    add_device_options(p)
    p.add_argument("--no_compile", action="store_true", help="no CUDA graphs: launch every kernel from Python")
    args = p.parse_args(argv)
    if args.max_new_tokens is None:
        args.max_new_tokens = 1024 if args.interactive or args.serve else 256
    try:
        args.method = flagged_method(args)
    except (ValueError, OSError) as e:  # also of a head that --draft names
        sys.exit(fail(e))
    wrong = check_engine(args) or check_run(args)
    if wrong:
        p.error(wrong)
    return args


def check_run(args: argparse.Namespace) -> str | None:
    """What is wrong with what the engine is asked to do, if anything."""
    for option in ("output", "profile", "tree_html"):
        if wrong := check_output(args, option):
            return wrong
    plain = args.method == BASELINE
    trees = args.show_tree or args.tree_html
    for wrong, message in (
            (args.serve == "", "--serve takes HOST:PORT, such as 127.0.0.1:8000"),
            (args.compare and plain, "--compare needs a method that drafts, such as --eagle2"),
            (trees and plain, "--show_tree and --tree_html need a method that drafts, such as --eagle2"),
            (bool(args.prompt_file) != bool(args.output), "--prompt_file and --output FILE go together"),
            (args.prompt is None and (args.compare or args.json or args.profile or args.tree_html),
             "--compare, --json, --profile and --tree_html are for a single --prompt"),
            (args.show_tree and (args.prompt_file or args.serve), "--show_tree is not for --prompt_file and --serve"),
            ((args.interactive or args.serve) and args.raw, "--interactive and --serve are without --raw"),
            (args.api_key is not None and not args.serve, "--api_key is for --serve"),
            (args.system and not args.interactive, "--system is for --interactive"),
            ("" in args.stop, "--stop must not be empty"),
            (args.stop and trees, "--show_tree and --tree_html are without --stop"),
            (args.raw and args.chat_template, "--chat_template is without --raw"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.temperature == 0 and (args.top_k, args.top_p, args.min_p) != (0, 1.0, 0.0),
             "--top_k, --top_p and --min_p need a --temperature above 0")):
        if wrong:
            return message
    try:
        asked_sampling(args)
    except ValueError as error:
        return f"--{error}"
    return None


def asked_sampling(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)


def max_seq_len(args: argparse.Namespace) -> int:
    return context(args, Config.load(folder_of(args.checkpoint)))


def work() -> int | None:
    """Do what the command line asks for. Returns the exit code, if it is not 0."""
    args = parse_args()
    try:
        return run(args, asked_sampling(args))
    except RuntimeError as error:
        if not memory.exhausted(error):
            raise
        return fail(MemoryError(memory.advice(args, *placement(args), max_seq_len(args))))


def run(args: argparse.Namespace, sampling: Sampling) -> int | None:
    if args.memory:
        return print(memory.summary(args, *placement(args), max_seq_len(args)))
    if args.prompt_file:
        return batch(args, sampling)
    if args.serve:
        from app.server import serve  # here, since what it needs need not be installed
        return serve(args, sampling)
    engine = load_engine(args)
    explain_template(engine.tokenizer, args)
    if args.show_tree or args.tree_html:
        watch(engine)
    if args.interactive:
        from app.chat import chat  # here, since prompt_toolkit takes long to import
        return chat(engine, engine.tokenizer, sampling, args.max_new_tokens, args.system, args.stop)
    ids = read_prompt(args, engine.tokenizer)
    engine.check(ids, args.max_new_tokens)
    engine.warm_up(sampling)
    result = answer_and_report(args, engine, ids, sampling)
    if args.tree_html:
        write_page(result, args.tree_html)
    if args.profile:
        print(write_trace(engine, ids, sampling, args.profile), file=sys.stderr)
    return None


def main() -> None:
    run_command(work)


if __name__ == "__main__":
    main()
