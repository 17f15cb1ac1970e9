"""Options of the command line, built from the table of methods, and the engine that they describe."""
import argparse
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import torch

import engine
from app.streams import as_utf8
from drafters.methods import BASELINE, METHODS, OPTIONS, make_drafter, method_of_head
from formats.config import Config
from formats.eagle import folder_of
from formats.weights import read_metadata
from model import load_model
from ops.device import gpu_problem, has_cuda
from ops.startup import part
from quant.linear import GROUPS, MODES, is_quantized
from tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EXTRAS = tuple(dict.fromkeys(part for name in METHODS for part in name.split("+")[1:]))  # what is added to a method


# ----- Adding options ----------------------------------------------------------------------------------------------


def add_method_flags(p: argparse.ArgumentParser) -> None:
    """--eagle2, --lookup, --medusa DIR ...: a flag for each part of a method's name, and --method NAME for any."""
    p.add_argument("--method", choices=METHODS, metavar="NAME", help=f"one of {', '.join(METHODS)}")
    group = p.add_mutually_exclusive_group()
    for name, row in METHODS.items():
        if "+" in name or name in (BASELINE, *EXTRAS):
            continue
        if row.weights and row.weights.option == name:
            group.add_argument(f"--{name}", **OPTIONS[name] | {"help": row.help})
        else:
            group.add_argument(f"--{name}", action="store_true", help=row.help)
    for extra in EXTRAS:
        rows = [f"with --{name.split('+')[0]}: {row.help}" for name, row in METHODS.items()
                if name.endswith(f"+{extra}")]
        alone = [METHODS[extra].help] if extra in METHODS else []
        p.add_argument(f"--{extra}", action="store_true", help="; ".join(alone + rows))


def flagged_method(args: argparse.Namespace) -> str:
    """The method that the flags of add_method_flags name; with --draft alone, the one for that kind of head. ValueError
    where they name two, OSError or ValueError where there is no such head."""
    parts = dict.fromkeys(part for name in METHODS for part in name.split("+") if part not in EXTRAS)
    given = [name for name in (*parts, *EXTRAS) if getattr(args, name, None)]
    if args.draft and not args.method and not set(given) - set(EXTRAS):
        given.insert(0, method_of_head(args.draft))
    flagged = "+".join(given) or BASELINE
    if args.method is None:
        return flagged
    weights = METHODS[args.method].weights
    if flagged not in (args.method, BASELINE) and not (weights and given == [weights.option]):
        raise ValueError(f"--method {args.method} and {' '.join(f'--{name}' for name in given)} name two methods")
    return args.method


def add_method_options(p: argparse.ArgumentParser, besides: tuple[str, ...] = ()) -> None:
    """What shapes the methods, and how weights are quantised. `besides`: options that are there already."""
    for name, how in OPTIONS.items():
        if name not in besides:
            p.add_argument(f"--{name}", **how)
    p.add_argument("--quantize", choices=MODES, help="quantise target and EAGLE head on load (better: quantize.py)")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.set_defaults(no_compile=False)


def add_device_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the device is fast at it, "
                   "float32 elsewhere, and on a CPU with --quantize")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    p.add_argument("--max_seq_len", type=int, help="longest text, prompt included, in tokens (default: the model's "
                   "context, at most 4096)")


# ----- Checking them -----------------------------------------------------------------------------------------------


def check_methods(args: argparse.Namespace, methods: list[str]) -> str | None:
    """What is wrong with the options for these methods, if anything."""
    for name in methods:
        if name in METHODS:
            continue
        for extra in EXTRAS:
            if extra in name.split("+"):
                takers = [row.partition("+")[0] for row in METHODS if extra in row.split("+")[1:]]
                return f"{name} is no method: {extra} goes with {', '.join(takers)}"
        return f"{name} is no method: there are {', '.join(METHODS)}"
    for option in OPTIONS:
        takers = [name for name, row in METHODS.items() if option in row.options or (
            row.weights and row.weights.option == option)]
        if getattr(args, option) is not None and not set(takers) & set(methods):
            return f"--{option} is for the method{'s' * (len(takers) > 1)} {', '.join(takers)}"
    auto = args.draft_tokens == "auto" or args.tree_table
    for wrong, message in (
            (args.tree_table and args.draft_tokens not in (None, "auto"), "--tree_table is for --draft_tokens auto"),
            (auto and (args.draft_depth is not None or args.draft_topk is not None),
             "--draft_tokens auto and --tree_table choose depth and top-k too"),
            ((args.draft_vocab or 0) < 0, "--draft_vocab must be 0 or more"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own")):
        if wrong:
            return message
    return None


def check_output(args: argparse.Namespace, option: str) -> str | None:
    """Why the file that this option names cannot be written, if so: said before the run, not after it."""
    path = getattr(args, option)
    if not path:
        return None
    if path.is_dir():
        return f"--{option} {path}: a folder, where a file should be"
    if not path.parent.is_dir():
        return f"--{option} {path}: there is no such folder"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"--{option} {path}: no permission to write there"
    return None


def check_engine(args: argparse.Namespace) -> str | None:
    """What is wrong with the engine that is asked for, if anything."""
    for wrong, message in (
            (args.max_seq_len is not None and not 2 <= args.max_seq_len <= 2**24,  # fp32 counts positions no further
             "--max_seq_len must be 2 to 16777216"),
            (args.checkpoint.is_file() and args.checkpoint.suffix != ".safetensors", f"--checkpoint {args.checkpoint}: "
             "should be a folder that convert_hf_checkpoint.py wrote, or a .safetensors file in it"),
            (args.dtype not in (None, *DTYPES), f"--dtype must be one of {', '.join(DTYPES)}"),
            (args.device not in (None, "cuda", "cpu"), "--device must be cuda or cpu")):
        if wrong:
            return message
    return check_methods(args, [args.method])


# ----- The engine --------------------------------------------------------------------------------------------------


def placement(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Device and dtype. ValueError where the device cannot be used."""
    problem = gpu_problem(args.device)
    if problem:
        raise ValueError(problem)
    device = args.device or ("cuda" if has_cuda() else "cpu")
    # bf16 halves the bytes, but a CPU without instructions for it (x86: AVX512-BF16 or AMX) emulates it slowly.
    # With quantised weights our kernels compute in fp32 there, and then a row's results do not depend on the others.
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    fast = device == "cuda" or has_bf16 and not (args.quantize or is_quantized_file(args.checkpoint))
    return device, DTYPES[args.dtype or ("bfloat16" if fast else "float32")]


def is_quantized_file(checkpoint: Path) -> bool:
    """Whether the file of a checkpoint, or model.safetensors in its folder, holds quantised weights."""
    return "mode" in read_metadata(checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint)


def context(args: argparse.Namespace, cfg: Config) -> int:
    """max_seq_len: the most tokens that a text may have."""
    if args.max_seq_len is not None:
        return args.max_seq_len
    return min(cfg.max_position_embeddings, cfg.context_limit or 4096, 4096)


class Engine(engine.Engine):
    """An engine made of generate.py's options, with the tokenizer of its checkpoint."""
    tokenizer: Tokenizer

    @classmethod
    def load(cls, checkpoint: Path | str, draft: str = BASELINE, *, device: str | None = None,
             dtype: torch.dtype | str | None = None, max_seq_len: int | None = None, compiled: bool = True,
             chat_template: Path | str | None = None, **options: object) -> "Engine":
        """The engine that generate.py makes of the same options. draft: a row of the table of methods
        (drafters/methods.py). head: what --draft is on the command line. All other options are called as there, for
        example draft_tokens=16, quantize="int8", medusa=DIR.

        Raises TypeError for an unknown option; ValueError or OSError with the line that generate.py would show.
        """
        args = parse_options(options)
        args.checkpoint = Path(checkpoint)
        args.method = draft
        args.max_seq_len = max_seq_len
        args.no_compile = not compiled
        args.chat_template = chat_template and Path(chat_template)
        args.device = device and str(device)
        args.dtype = dtype and str(dtype).removeprefix("torch.")
        return load_engine(args, cls)


def load_engine(args: argparse.Namespace, kind: type[Engine] = Engine) -> Engine:
    """The engine that the options describe. Raises ValueError or OSError with one line to show."""
    wrong = check_engine(args)
    if wrong:
        raise ValueError(wrong)
    device, dtype = placement(args)
    with ThreadPoolExecutor(1) as pool:  # a large tokenizer takes as long as weights that come from the page cache
        tokenizer = pool.submit(Tokenizer, folder_of(args.checkpoint), args.chat_template)
        with part("model"):
            model = load_model(args.checkpoint, device, dtype, args.quantize, args.group or 128)
    if device == "cpu" and dtype != torch.float32 and is_quantized(model):
        print(f"{args.checkpoint}: slower than it could be: for quantised weights a CPU has kernels in float32 only, "
              "which is the default", file=sys.stderr)
    with part("tokenizer"):
        tokenizer = tokenizer.result()
    if args.chat_template and tokenizer.template_error:
        raise ValueError(tokenizer.template_error)
    max_seq_len = context(args, model.cfg)
    drafter = make_drafter(args.method, args, model, max_seq_len)
    made = kind(model, drafter, max_seq_len, tokenizer.stop_ids, not args.no_compile)
    made.tokenizer = tokenizer
    if max_seq_len > model.cfg.max_position_embeddings:
        print(f"--max_seq_len {max_seq_len}: the model was made for {model.cfg.max_position_embeddings} tokens, and "
              "writes nonsense beyond them", file=sys.stderr)
    return made


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """The ids of --prompt, in the chat template unless --raw or there is none."""
    try:
        if args.prompt.startswith("@"):
            text = Path(args.prompt[1:]).read_text(encoding="utf-8-sig")
        else:
            text = sys.stdin.read() if args.prompt == "-" else as_utf8(args.prompt)
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt {args.prompt}: not UTF-8, convert it, for example with iconv ({error})") from None
    if not text.strip():
        raise ValueError("--prompt is empty")
    return tokenizer.encode(text) if args.raw else tokenizer.dialogue([text])


def explain_template(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Say on stderr, in one line, what may surprise about the chat template: that there is none, or that an answer may
    not end. ValueError where it is needed and broken."""
    if args.raw or (args.interactive and not tokenizer.has_chat_template):  # a chat refuses to begin without one
        return
    if tokenizer.template_error:
        raise ValueError(tokenizer.template_error)
    if not tokenizer.has_chat_template:
        print(f"{args.checkpoint}: no chat template, so the text is continued as it is; --chat_template FILE gives one "
              "(docs/usage.md), --raw says that none is meant", file=sys.stderr)
    elif not tokenizer.turn_ends and not args.stop:
        ends = [str(tokenizer.bpe.id_to_token(i)) for i in sorted(tokenizer.stop_ids)] or ["--max_new_tokens"]
        line = tokenizer.after_answer
        hint = f"; --stop {shlex.quote(line)} ends it there too" if line else ""
        print(f"{args.checkpoint}: the chat template writes no special token after an answer, which may run on to "
              f"{', '.join(ends)}{hint}", file=sys.stderr)


class OptionParser(argparse.ArgumentParser):
    """For options that a program gives instead of a person: an error is a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_options(options: dict[str, object]) -> argparse.Namespace:
    """What the command line would make of these options. TypeError for one that does not exist, ValueError with the
    command line's own words for a bad value."""
    parser = OptionParser(add_help=False)
    add_method_options(parser)
    known = vars(parser.parse_args([])).keys() - {"draft", "no_compile"} | {"head"}  # `draft` is the method's name here
    words = []
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"Engine.load has no option {name!r}: there are {', '.join(sorted(known))}")
        flag = "--draft" if name == "head" else f"--{name}"
        if isinstance(value, (list, tuple)):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words.append(flag if value is True else f"{flag}={value}")
    return parser.parse_args(words)
