"""Options of generate.py and bench.py, and the engine that they describe."""
import argparse
import sys
from pathlib import Path
from typing import NoReturn

import torch

import engine
from drafters.lookup import RULES
from drafters.methods import METHODS, make_drafter
from formats.config import Config
from formats.eagle import folder_of
from model import load_model
from quant.linear import GROUPS, MODES
from tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def nodes(text: str) -> int | str:
    return text if text == "auto" else int(text)


def add_options(p: argparse.ArgumentParser) -> None:
    """What the methods draft with, and how much."""
    p.add_argument("--draft", type=Path, help="EAGLE head: its folder, or a file in it (default: <checkpoint>/eagle, "
                   "of which the file with the name of the model's)")
    p.add_argument("--draft_vocab", type=int, help="EAGLE drafts only so many of the head's frequent tokens; 0: all")
    p.add_argument("--quantize", choices=MODES, help="quantise target and EAGLE head on load (better: quantize.py)")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--draft_tokens", type=nodes, help="EAGLE-2: nodes of the tree, the root included; auto: as many, "
                   "and levels, as are fastest with this head on this device (default on a GPU, if the head says what "
                   "it gains)")
    p.add_argument("--draft_depth", type=int, help="EAGLE-2: levels of drafted tokens")
    p.add_argument("--draft_topk", type=int, help="EAGLE-2: nodes fed a level, and continuations of each")
    p.add_argument("--chain", type=int, help="tokens that are looked up, or written by a draft model (default: 10, 5, "
                   "both together 8)")
    p.add_argument("--lookup_rule", choices=RULES, default="longest", help="which match is continued (lookup.py)")
    p.add_argument("--window", type=int, nargs=3, default=(7, 5, 7), metavar=("W", "N", "G"),
                   help="Lookahead: window, n-gram, guesses (default: 7 5 7)")


def check_options(args: argparse.Namespace, methods: list[str]) -> str | None:
    """What is wrong with the options for these methods, if anything."""
    tree, shape = any(m.startswith("eagle2") for m in methods), (args.draft_tokens, args.draft_depth, args.draft_topk)
    eagle = any(m.startswith("eagle") for m in methods)
    chain = any("lookup" in m or m.startswith("speculate") for m in methods)
    for wrong, message in (
            (any(shape) and not tree, "--draft_tokens, --draft_depth and --draft_topk shape --eagle2's tree"),
            (args.chain is not None and not chain, "--chain is for --lookup and --speculate"),
            (args.draft_tokens == "auto" and any(shape[1:]), "--draft_tokens auto chooses depth and top-k too"),
            ((args.draft or args.draft_vocab is not None) and not eagle,
             "--draft and --draft_vocab need --eagle2 or --eagle"),
            ((args.draft_vocab or 0) < 0, "--draft_vocab must be 0 or more"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own")):
        if wrong:
            return message
    return None


def check_engine(args: argparse.Namespace) -> str | None:
    """What is wrong with the engine that is asked for, if anything."""
    eagle2 = args.method.startswith("eagle2")
    for wrong, message in (
            (args.method not in METHODS, f"{args.method} is no method: there are {', '.join(METHODS)}"),
            (args.medusa and args.method != "medusa", "--medusa is for the method medusa"),
            (args.speculate and not args.method.startswith("speculate"), "--speculate is for the method speculate"),
            (args.tree_table and not eagle2, "--tree_table is for --eagle2"),
            (args.tree_table and args.draft_tokens not in (None, "auto"), "--tree_table is for --draft_tokens auto"),
            (args.tree_table and (args.draft_depth or args.draft_topk), "--tree_table chooses depth and top-k too"),
            (args.max_seq_len is not None and not 2 <= args.max_seq_len <= 2**24,  # fp32 counts places no further
             "--max_seq_len must be 2 to 16777216"),
            (args.dtype not in (None, *DTYPES), f"--dtype must be one of {', '.join(DTYPES)}"),
            (args.device not in (None, "cuda", "cpu"), "--device must be cuda or cpu"),
            (args.device == "cuda" and not torch.cuda.is_available(),
             "--device cuda, but torch finds no CUDA device (torch.cuda.is_available() is false)")):
        if wrong:
            return message
    return check_options(args, [args.method])


class Options(argparse.ArgumentParser):
    """Options that a program gives instead of a person: what is wrong with them is a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def engine_args(options: dict[str, object]) -> argparse.Namespace:
    """What the command line makes of these options. TypeError for one that there is not, ValueError with the command
    line's own words for a value that makes no sense."""
    parser = Options(add_help=False)
    add_options(parser)
    parser.add_argument("--medusa", type=Path)
    parser.add_argument("--speculate", type=Path)
    parser.add_argument("--tree_table", action="store_true")
    known, words = vars(parser.parse_args([])).keys() - {"draft"} | {"head"}, []  # `draft` is the method's name here
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"Engine.load has no option {name!r}: there are {', '.join(sorted(known))}")
        name = "--draft" if name == "head" else f"--{name}"
        if isinstance(value, (list, tuple)):
            words += [name, *map(str, value)]
        elif value is not None and value is not False:
            words.append(name if value is True else f"{name}={value}")
    return parser.parse_args(words)


def placement(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Device and dtype."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 halves the bytes; a CPU without instructions for it (x86: AVX512-BF16 or AMX) emulates it slowly
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    default = "bfloat16" if fast_bf16 else "float16" if device == "cuda" else "float32"
    return device, DTYPES[args.dtype or default]


def context(args: argparse.Namespace, cfg: Config) -> int:
    """How many slots the cache has."""
    return args.max_seq_len or min(cfg.max_position_embeddings, cfg.sliding_window or 4096, 4096)


class Engine(engine.Engine):
    """An engine made of generate.py's options, with the tokenizer of its checkpoint."""
    tokenizer: Tokenizer

    @classmethod
    def load(cls, checkpoint: Path | str, draft: str = "vanilla", *, device: str | None = None,
             dtype: torch.dtype | str | None = None, max_seq_len: int | None = None, compiled: bool = True,
             **options: object) -> "Engine":
        """The engine that generate.py makes of the same options: `draft` is one of methods.METHODS, `head` is --draft,
        all others are called as there (draft_tokens=16, quantize="int8", medusa=DIR). With engine.tokenizer.

        Raises TypeError for an option that there is not, ValueError or OSError with the line that generate.py shows.
        """
        args = engine_args(options)
        args.checkpoint, args.method, args.max_seq_len = Path(checkpoint), draft, max_seq_len
        args.no_compile, args.device = not compiled, device and str(device)
        args.dtype = dtype and str(dtype).removeprefix("torch.")
        return load_engine(args)


def load_engine(args: argparse.Namespace) -> Engine:
    """The engine that the options describe, with its tokenizer. Raises ValueError or OSError with one line to show."""
    wrong = check_engine(args)
    if wrong:
        raise ValueError(wrong)
    folder = folder_of(args.checkpoint)
    model = load_model(args.checkpoint, *placement(args), args.quantize, args.group or 128)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}")
    max_seq_len = context(args, model.cfg)
    drafter = make_drafter(args.method, args, model, max_seq_len)
    loaded = Engine(model, drafter, max_seq_len, tokenizer.stop_ids, not args.no_compile)
    loaded.tokenizer = tokenizer
    return loaded


def fail(error: Exception) -> int:
    """One line on stderr; the exit code for bad input is 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
