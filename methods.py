"""The methods by name: which drafter each is, the options that generate.py and bench.py share, and an engine made of
them.

A part that several methods draft with (a head, a draft model) is loaded once.
"""
import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from autotree import curve_path, fit, profile_key, read_curve
from draft import Eagle1, Eagle2, find_head, folder_of, load_head
from drafter import Drafter, Vanilla
from engine import Engine
from lookahead import Lookahead
from lookup import RULES, Lookup, Retrieval
from medusa import Medusa, load_medusa
from model import Config, Llama, load_model
from quantizers import GROUPS, MODES
from speculate import Speculate, load_draft_model
from tokenizer import Tokenizer

METHODS = ("vanilla", "lookup", "lookahead", "medusa", "speculate", "speculate+rejection", "speculate+lookup", "eagle",
           "eagle2", "eagle2+lookup")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GPU_TREE = (60, 6, 10)  # tokens, depth, topk of the paper; see autotree.py
CPU_TREE = (8, 3, 3)  # where width is not free; see BENCHMARKS.md
CHAIN = 10  # tokens that are looked up, alone or beside EAGLE-2
Parts = dict[str, nn.Module]


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


def load_engine(args: argparse.Namespace, kind: type[Engine] = Engine) -> Engine:
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
    engine = kind(model, drafter, max_seq_len, tokenizer.stop_ids, not args.no_compile)
    engine.tokenizer = tokenizer
    return engine


def make_drafter(method: str, args: argparse.Namespace, model: Llama, max_seq_len: int, parts: Parts | None = None
                 ) -> Drafter:
    """The drafter of one of METHODS. `parts` keeps what was loaded for the next method. Raises ValueError or OSError
    with one line to show."""
    device, chain, (name, *with_) = model.embed.weight.device, args.chain, method.split("+")

    def part(what: str, load: Callable[[], nn.Module]) -> nn.Module:
        found = (parts or {}).get(what) or load()
        if parts is not None:
            parts[what] = found
        return found

    if name == "vanilla":
        return Vanilla(device)
    if name == "lookup":
        return Lookup(device, CHAIN if chain is None else chain, args.lookup_rule)
    if name == "lookahead":
        return Lookahead(model, *args.window)
    if name == "medusa":
        return Medusa(part("medusa", lambda: load_medusa(needed(args.medusa, "--medusa"), model)), model)
    if name == "speculate":
        draft = part("speculate", lambda: checked_draft_model(args, model))
        retrieval = Retrieval(4, args.lookup_rule, device) if "lookup" in with_ else None
        length = (8 if retrieval else 5) if chain is None else chain
        return Speculate(draft, model, length, "rejection" in with_, retrieval)
    path = args.draft or find_head(args.checkpoint)
    head = part("eagle", lambda: load_head(path, model, args.draft_vocab, args.quantize, args.group or 128))
    if name == "eagle":
        return Eagle1(head, model)
    retrieval = Retrieval(CHAIN if chain is None else chain, args.lookup_rule, device) if with_ else None
    return Eagle2(head, model, *tree_shape(args, model, head, path, max_seq_len), retrieval)


def checked_draft_model(args: argparse.Namespace, model: Llama) -> Llama:
    """--speculate's model. Where it has a tokenizer, its tokens must have the ids that they have in the target's."""
    path = needed(args.speculate, "--speculate")
    draft = load_draft_model(path, model)
    ours, theirs = map(folder_of, (args.checkpoint, path))
    if any((theirs / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        known = Tokenizer(ours).bpe.get_vocab()
        wrong = [t for t, i in Tokenizer(theirs).bpe.get_vocab().items() if known.get(t, i) != i]
        if wrong:
            raise ValueError(f"{theirs}: {len(wrong)} of its tokens have other ids than {ours} gives them, such as "
                             f"{wrong[0]!r}: a draft model needs the same tokenizer")
    return draft


def needed(path: Path | None, option: str) -> Path:
    if path is None:
        raise ValueError(f"{option} DIR is missing: what should it draft with?")
    return path


def tree_shape(args: argparse.Namespace, model: Llama, head: nn.Module, draft: Path, max_seq_len: int
               ) -> tuple[int, int, int]:
    """Tokens, depth and top-k of EAGLE-2's tree: as asked for, else what fits, else the device's default."""
    cuda, asked = model.embed.weight.is_cuda, (args.draft_tokens, args.draft_depth, args.draft_topk)
    default, show = GPU_TREE if cuda else CPU_TREE, getattr(args, "tree_table", False)
    known = cuda and not any(asked) and not getattr(args, "no_compile", False) and curve_path(draft).is_file()
    if known or show or args.draft_tokens == "auto":
        key = profile_key(model, head, (args.checkpoint, draft), args.quantize, args.group)
        return fit(model, head, read_curve(draft), max_seq_len, key, show) or default
    return tuple(given or usual for given, usual in zip(asked, default))
