"""The table of methods."""
import argparse
from collections.abc import Callable
from pathlib import Path

from torch import nn

from draft import Drafter, Eagle2, Vanilla, load_head
from drafters.eagle1 import Eagle1
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup, Retrieval
from drafters.medusa import Medusa, load_medusa
from drafters.speculate import Speculate, load_draft_model
from drafters.tree_size import curve_path, fit, profile_key, read_curve
from formats.eagle import find_head, folder_of
from model import Llama
from tokenizer import Tokenizer

METHODS = ("vanilla", "lookup", "lookahead", "medusa", "speculate", "speculate+rejection", "speculate+lookup", "eagle",
           "eagle2", "eagle2+lookup")
GPU_TREE = (60, 6, 10)  # tokens, depth, topk of the paper; see autotree.py
CPU_TREE = (8, 3, 3)  # where width is not free; see BENCHMARKS.md
CHAIN = 10  # tokens that are looked up, alone or beside EAGLE-2
Parts = dict[str, nn.Module]


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
