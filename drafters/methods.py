"""The table of methods: every way to decode, by its name. Here is where a new drafter is added.

A row says how the drafter is made, which weights it drafts with, and which options it takes. generate.py and bench.py
build their flags from this table, memory planning and the benchmarks read it. docs/your_own_drafter.md adds one.
"""
import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from draft import Drafter, EagleHead, Vanilla
from drafters.block import BlockHead
from drafters.eagle1 import Eagle1
from drafters.eagle3 import Eagle3Head
from drafters.heads import LARGE, Head, Quantize, load_head, tree_drafter, type_of_head
from drafters.lookahead import Lookahead
from drafters.lookup import RULES, Lookup, Retrieval
from drafters.medusa import Medusa, load_medusa
from drafters.speculate import Speculate, load_draft_model
from drafters.tree_size import curve_path, fastest_tree, profile_key, read_curve
from formats.eagle import find_head, folder_of
from formats.tokenizer_files import TOKENIZERS
from model import Llama
from ops.startup import part
from tokenizer import Tokenizer

BASELINE = "vanilla"  # plain decoding, which all others are compared with
GPU_TREE = (60, 6, 10)  # EAGLE-2's nodes, levels and top-k: the paper's
CPU_TREE = (8, 4, 3)  # the same on a CPU, where more rows cost more (docs/benchmarking.md)
CHAIN = 10  # tokens that are looked up, alone or beside a head's tree
RULE = "longest"  # which match of a look-up is continued
WINDOW = (7, 5, 7)  # Lookahead's window, n-gram and guesses


class Setup(NamedTuple):
    """What a drafter is made of."""
    model: Llama  # the target
    args: argparse.Namespace
    weights: Any  # what the row's Weights loaded; None if it has none
    max_seq_len: int

    def get(self, option: str, default: Any) -> Any:
        """The value of an option, or the default where it was not given (0 is given)."""
        value = getattr(self.args, option)
        return default if value is None else value


class Weights(NamedTuple):
    """Weights that methods draft with; they are loaded once, whichever methods share them."""
    option: str  # the option that names their folder
    load: Callable[[argparse.Namespace, Llama], nn.Module]
    widen: Callable[[Any, nn.Module], nn.Module]  # (benchmarks.shape.Widening, weights) -> weights for the wide target


class Method(NamedTuple):
    """A row of the table."""
    make: Callable[[Setup], Drafter]
    help: str
    weights: Weights | None = None
    options: tuple[str, ...] = ()  # of OPTIONS, besides the one that names the weights


# ----- Weights -----------------------------------------------------------------------------------------------------


def eagle_path(args: argparse.Namespace, folder: str = "eagle") -> Path:
    """The head that --draft names, or the one in this folder of the checkpoint."""
    return args.draft or find_head(args.checkpoint, folder)


def load_eagle(args: argparse.Namespace, model: Llama, folder: str = "eagle") -> Head:
    """A head of any kind: the one that --draft names, or the one in this folder of the checkpoint. Says what the files
    of the head leave open."""
    path = eagle_path(args, folder)
    device = model.embed.weight.device.type
    head = load_head(path, model, args.draft_vocab, weights_of_head(args, args.device if device == "meta" else device))
    if doubts := getattr(head, "doubts", ()):
        print(f"{path}: its files leave open what {' and '.join(doubts)} should be, and the likeliest is taken; "
              "convert_hf_checkpoint.py --eagle tries it out", file=sys.stderr)
    return head


def weights_of_head(args: argparse.Namespace, device: str) -> Quantize:
    """How a head that is not quantised is drafted with. Texts are the same, and drafts as good in int8. A level of a
    large head takes a GPU 60 % of the time then; int4 would save little more, and drafts worse (docs/experiments.md).
    """
    if args.draft_weights:
        return Quantize("int8" if args.draft_weights == "int8" else None)
    if args.quantize:
        return Quantize("int8")
    return Quantize("int8" if device == "cuda" else None, least=LARGE)


def widen_eagle(wide: Any, head: Head) -> Head:
    if isinstance(head, BlockHead):
        return wide.block(head)
    return wide.head3(head) if isinstance(head, Eagle3Head) else wide.head(head)


def load_checked_draft_model(args: argparse.Namespace, model: Llama) -> Llama:
    """ValueError where the draft model has a tokenizer that gives tokens other ids than the target's."""
    path = required(args.speculate, "--speculate")
    draft = load_draft_model(path, model)
    target_folder, draft_folder = folder_of(args.checkpoint), folder_of(path)
    if any((draft_folder / name).is_file() for name in TOKENIZERS):
        known = Tokenizer(target_folder).bpe.get_vocab()
        wrong = [token for token, i in Tokenizer(draft_folder).bpe.get_vocab().items() if known.get(token, i) != i]
        if wrong:
            raise ValueError(f"{draft_folder}: {len(wrong)} of its tokens have other ids than {target_folder} gives "
                             f"them, such as {wrong[0]!r}: a draft model needs the same tokenizer")
    return draft


def required(path: Path | None, option: str) -> Path:
    if path is None:
        raise ValueError(f"{option} DIR is missing: what should it draft with?")
    return path


def method_of_head(path: Path) -> str:
    """The row for a head that --draft names without a method. Raises ValueError or OSError if it is no such head."""
    return ROW_OF_HEAD[type_of_head(path)][0]


# The row of a head of each kind, and what to call the kind.
ROW_OF_HEAD = {EagleHead: ("eagle2", "an EAGLE-1/2 head"), Eagle3Head: ("eagle3", "an EAGLE-3 head"),
               BlockHead: ("block", "a block head")}
EAGLE = Weights("draft", load_eagle, widen_eagle)
EAGLE3 = Weights("draft", partial(load_eagle, folder=Eagle3Head.folder), widen_eagle)
BLOCK = Weights("draft", partial(load_eagle, folder=BlockHead.folder), widen_eagle)
MEDUSA = Weights("medusa", lambda args, model: load_medusa(required(args.medusa, "--medusa"), model),
                 lambda wide, heads: wide.medusa(heads))
DRAFT_MODEL = Weights("speculate", load_checked_draft_model, lambda wide, draft: wide.draft_model(draft))


# ----- Options -----------------------------------------------------------------------------------------------------


def number_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from error


# Options that shape a method, as argparse takes them. None: not given.
OPTIONS: dict[str, dict[str, Any]] = {
    "draft": dict(type=Path, help="draft head: its folder, or a file in it (default: <checkpoint>/eagle or, with "
                  "--eagle3 or --block, <checkpoint>/eagle3 or block, and in it the file named like the model's)"),
    "medusa": dict(type=Path, metavar="DIR", help="Medusa heads: their folder"),
    "speculate": dict(type=Path, metavar="DIR", help="draft model: its folder"),
    "draft_vocab": dict(type=int, help="EAGLE drafts only this many of the head's most frequent tokens, and the "
                        "prompt's own; 0: all"),
    "draft_weights": dict(choices=("int8", "stored"), help="weights of the draft head: 8 bits, or as they are stored "
                          "(default: int8 with --quantize, and for large heads on a GPU; texts are the same)"),
    "draft_tokens": dict(type=number_or_auto, help="EAGLE-2: nodes of the tree, the root included; auto: as many "
                         "nodes and levels as are fastest with this head on this device (the default on a GPU, if the "
                         "head comes with an acceptance.json)"),
    "draft_depth": dict(type=int, help="EAGLE-2: levels of drafted tokens"),
    "draft_topk": dict(type=int, help="EAGLE-2: nodes fed per level, and continuations of each"),
    "tree_table": dict(action="store_true", default=None, help="--draft_tokens auto, and show what it compared"),
    "chain": dict(type=int, help="tokens that are looked up (default: 10) or drafted by a model (5; 8 with both)"),
    "lookup_rule": dict(choices=tuple(RULES), help=f"which match is continued (drafters/lookup.py; default: {RULE})"),
    "window": dict(type=int, nargs=3, metavar=("W", "N", "G"),
                   help=f"Lookahead: window, n-gram and guesses (default: {' '.join(map(str, WINDOW))})")}
TREE = ("draft_tokens", "draft_depth", "draft_topk", "tree_table", "draft_vocab", "draft_weights")
BLOCK_TREE = tuple(option for option in TREE if option != "draft_depth")
LOOKUP = ("chain", "lookup_rule")


# ----- The drafters ------------------------------------------------------------------------------------------------


def make_lookup(setup: Setup) -> Drafter:
    device = setup.model.embed.weight.device
    return Lookup(device, setup.get("chain", CHAIN), setup.get("lookup_rule", RULE))


def retrieval(setup: Setup, length: int) -> Retrieval:
    return Retrieval(length, setup.get("lookup_rule", RULE), setup.model.embed.weight.device)


def make_lookahead(setup: Setup) -> Drafter:
    return Lookahead(setup.model, *setup.get("window", WINDOW))


def make_medusa(setup: Setup) -> Drafter:
    return Medusa(setup.weights, setup.model)


def make_speculate(setup: Setup, rejection: bool = False) -> Drafter:
    return Speculate(setup.weights, setup.model, setup.get("chain", 5), rejection)


def make_staged(setup: Setup) -> Drafter:
    return Speculate(setup.weights, setup.model, setup.get("chain", 8), retrieval=retrieval(setup, 4))


def make_tree(setup: Setup, with_lookup: bool = False, kind: type = EagleHead) -> Drafter:
    """The dynamic tree of a head of this kind. ValueError for a head of another kind: each kind has a row, and speeds
    are reported under its name."""
    head = head_of(setup, kind)
    chain = retrieval(setup, setup.get("chain", CHAIN)) if with_lookup else None
    return tree_drafter(head, setup.model, *tree_shape(setup), chain)


def head_of(setup: Setup, *kinds: type) -> Head:
    """The head, of one of these kinds. ValueError for another."""
    if not isinstance(setup.weights, kinds):
        row, name = ROW_OF_HEAD[type(setup.weights)]
        raise ValueError(f"{eagle_path(setup.args, kinds[0].folder)}: holds {name}: use --{row}")
    return setup.weights


def tree_shape(setup: Setup) -> tuple[int, int, int]:
    """Nodes, levels and top-k of a dynamic tree: as given, else the fastest, else the device's default."""
    args, model, head = setup.args, setup.model, setup.weights
    cuda = model.embed.weight.is_cuda
    default = GPU_TREE if cuda else CPU_TREE
    given = (args.draft_tokens, args.draft_depth, args.draft_topk)
    path = eagle_path(args, head.folder)
    captured = cuda and not args.no_compile  # the measured times are those of CUDA graphs
    known = captured and given == (None, None, None) and curve_path(path).is_file()
    if known or args.tree_table or args.draft_tokens == "auto":
        key = profile_key(model, head, (args.checkpoint, path), args.quantize, args.group)
        return fastest_tree(model, head, read_curve(path), setup.max_seq_len, key, bool(args.tree_table)) or default
    return tuple(usual if value is None else value for value, usual in zip(given, default))


# ----- The table ---------------------------------------------------------------------------------------------------

METHODS: dict[str, Method] = {
    BASELINE: Method(lambda setup: Vanilla(setup.model.embed.weight.device), "plain decoding"),
    "lookup": Method(make_lookup, "draft what the text itself suggests", options=LOOKUP),
    "lookahead": Method(make_lookahead, "draft with n-grams from Jacobi iterations", options=("window",)),
    "medusa": Method(make_medusa, "draft with these Medusa heads", MEDUSA),
    "speculate": Method(make_speculate, "draft with a smaller model of the same tokens", DRAFT_MODEL, ("chain",)),
    "speculate+rejection": Method(
        lambda setup: make_speculate(setup, rejection=True), "the papers' rule when sampling: accepts more, but the "
        "same seed no longer gives the text of plain decoding", DRAFT_MODEL, ("chain",)),
    "speculate+lookup": Method(make_staged, "speed up the draft model by what the text suggests", DRAFT_MODEL, LOOKUP),
    "eagle": Method(lambda setup: Eagle1(head_of(setup, EagleHead, Eagle3Head), setup.model), "draft with EAGLE-1's "
                    "fixed tree", EAGLE, ("draft_vocab", "draft_weights")),
    "eagle2": Method(make_tree, "draft with EAGLE-2's dynamic tree", EAGLE, TREE),
    "eagle2+lookup": Method(
        lambda setup: make_tree(setup, with_lookup=True), "let what the text suggests compete with its own nodes",
        EAGLE, TREE + LOOKUP),
    "eagle3": Method(lambda setup: make_tree(setup, kind=Eagle3Head), "draft EAGLE-2's dynamic tree with an EAGLE-3 "
                     "head", EAGLE3, TREE),
    "eagle3+lookup": Method(
        lambda setup: make_tree(setup, with_lookup=True, kind=Eagle3Head), "the same, and what the text suggests "
        "competes", EAGLE3, TREE + LOOKUP),
    "block": Method(lambda setup: make_tree(setup, kind=BlockHead), "draft a tree from one forward of a block head "
                    "(DFlash, DSpark, JetSpec)", BLOCK, BLOCK_TREE),
    "block+lookup": Method(
        lambda setup: make_tree(setup, with_lookup=True, kind=BlockHead), "the same, and what the text suggests "
        "competes", BLOCK, BLOCK_TREE + LOOKUP)}


WITH_TREES = [name for name, row in METHODS.items() if "draft_tokens" in row.options and "+" not in name]


def head_path(args: argparse.Namespace, method: str) -> Path:
    """Where the head of a method is."""
    return eagle_path(args, {EAGLE3: Eagle3Head, BLOCK: BlockHead}.get(METHODS[method].weights, EagleHead).folder)


def make_drafter(method: str, args: argparse.Namespace, model: Llama, max_seq_len: int,
                 loaded: dict[Weights, nn.Module] | None = None) -> Drafter:
    """The drafter of a row. `loaded` keeps weights for the next method that shares them. Raises ValueError or OSError
    with one line to show."""
    row = METHODS[method]
    weights = None
    if row.weights:
        loaded = {} if loaded is None else loaded
        if row.weights not in loaded:
            with part("draft head"):
                loaded[row.weights] = row.weights.load(args, model)
        weights = loaded[row.weights]
    return row.make(Setup(model, args, weights, max_seq_len))
