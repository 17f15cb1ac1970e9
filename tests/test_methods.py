"""methods.py: each name makes its drafter, with the sizes asked for; what does not fit is refused in one line."""
import json
from pathlib import Path

import pytest
import tiny
import torch

import generate
import methods
from draft import Eagle1, Eagle2
from drafter import Vanilla
from engine import Engine
from lookahead import Lookahead
from lookup import Lookup
from medusa import Medusa, MedusaHeads, save_medusa
from methods import METHODS, make_drafter
from model import Llama
from speculate import Speculate


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Llama]:
    """A target with an EAGLE head, Medusa heads, and itself as draft model."""
    model, head = tiny.pair(0, 0.1, torch.float32)
    folder = tiny.save_target(model, tmp_path / "target")
    tiny.save_head(head, folder / "eagle")
    save_medusa(MedusaHeads(model.cfg.hidden_size, 4), folder / "medusa")
    return folder, model


def arguments(folder: Path, *words: str) -> list[str]:
    return ["--checkpoint", str(folder), "--prompt", "x", "--device", "cpu", *words]


FLAGS = {"vanilla": (), "lookup": ("--lookup",), "lookahead": ("--lookahead",), "medusa": ("--medusa", "medusa"),
         "speculate": ("--speculate", "."), "speculate+rejection": ("--speculate", ".", "--rejection"),
         "speculate+lookup": ("--speculate", ".", "--lookup"), "eagle": ("--eagle",), "eagle2": ("--eagle2",),
         "eagle2+lookup": ("--eagle2", "--lookup")}
KINDS = {"vanilla": Vanilla, "lookup": Lookup, "lookahead": Lookahead, "medusa": Medusa, "speculate": Speculate,
         "eagle": Eagle1, "eagle2": Eagle2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, checkpoint: tuple[Path, Llama]) -> None:
    """A flag that makes another drafter than its name, a retrieval or a rule that gets lost; and all write one text."""
    folder, model = checkpoint
    words = [str(folder / word) if word in (".", "medusa") else word for word in FLAGS[method]]
    args = generate.parse_args(arguments(folder, *words))
    assert args.method == method
    drafter = make_drafter(method, args, model, 128)
    assert type(drafter) is KINDS[method.partition("+")[0]] and drafter.rejection == ("rejection" in method)
    if method != "lookup":
        assert bool(getattr(drafter, "retrieval", None)) == ("lookup" in method)
    ids = tiny.prompt(1, 9)
    text = sum(Engine(model, drafter, 128).generate(ids, 30), [])
    assert text == sum(Engine(model, Vanilla(), 128).generate(ids, 30), [])


@pytest.mark.parametrize("method", METHODS)
def test_limits(method: str, checkpoint: tuple[Path, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one token, of whole chunks and one more or less, of all slots but one; texts up to the very last slot,
    where no tree fits any more; stop ids within a path that is accepted. Every drafter must write what the plainest
    decoding writes."""
    folder, model = checkpoint
    monkeypatch.setattr("engine.PREFILL_CHUNK", 8)
    words = [str(folder / word) if word in (".", "medusa") else word for word in FLAGS[method]]
    args, parts, slots = generate.parse_args(arguments(folder, *words)), {}, 40
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 33, slots - 2, slots - 1):
        ids = tiny.prompt(length, length)
        text = []
        while len(ids + text) < slots:
            text.append(int(tiny.logits(model, ids + text)[-1].argmax()))  # no cache, no chunks
        fast = Engine(model, make_drafter(method, args, model, slots, parts), slots)
        assert sum(fast.generate(ids, 1000), []) == text
        for stop in {*text[1:12]}:
            fast = Engine(model, make_drafter(method, args, model, slots, parts), slots, frozenset({stop, 999}))
            assert sum(fast.generate(ids, 1000), []) == text[:text.index(stop) + 1]
    for wrong in ([], tiny.prompt(0, slots)):
        with pytest.raises(ValueError, match="prompt"):
            list(fast.generate(wrong, 1))


def test_sizes(checkpoint: tuple[Path, Llama]) -> None:
    """A size that is not passed on: a tree counts the root, a chain does not."""
    folder, model = checkpoint
    for method, words, nodes in (("lookup", ("--chain", "4"), 5), ("eagle2", ("--draft_tokens", "5"), 5),
                                 ("speculate", ("--chain", "9"), 10), ("lookup", (), 11), ("speculate", (), 6),
                                 ("lookahead", ("--window", "3", "3", "2"), 10)):
        flags = [str(folder / word) if word == "." else word for word in FLAGS[method]]
        args = generate.parse_args(arguments(folder, *flags, *words))
        assert make_drafter(method, args, model, 128).num_nodes == nodes


def test_parts_are_loaded_once(checkpoint: tuple[Path, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = checkpoint
    args, parts, loads = generate.parse_args(arguments(folder, "--eagle2")), {}, []
    load = methods.load_head
    monkeypatch.setattr(methods, "load_head", lambda *inputs: loads.append(1) or load(*inputs))
    made = [make_drafter(method, args, model, 128, parts) for method in ("eagle", "eagle2", "eagle2+lookup")]
    assert len(loads) == 1 and all(drafter.head is made[0].head for drafter in made)


def test_refused(checkpoint: tuple[Path, Llama], demo: Path, tmp_path: Path) -> None:
    """A draft model whose tokens have other ids, found by its acceptance alone; heads that nobody named."""
    folder, model = checkpoint
    args = generate.parse_args(arguments(folder))
    args.medusa = args.speculate = None
    for method, option in (("medusa", "--medusa"), ("speculate", "--speculate")):
        with pytest.raises(ValueError, match=option):
            make_drafter(method, args, model, 128)
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        (folder / name).write_bytes((demo / name).read_bytes())
    other = tiny.save_target(model, tmp_path / "other")
    raw = json.loads((demo / names[0]).read_text(encoding="utf-8"))
    for swapped in (False, True):
        if swapped:
            vocab = raw["model"]["vocab"]
            a, b = list(vocab)[-2:]
            vocab[a], vocab[b] = vocab[b], vocab[a]
        (other / names[0]).write_text(json.dumps(raw))
        (other / names[1]).write_bytes((demo / names[1]).read_bytes())
        args.speculate = other
        if swapped:
            with pytest.raises(ValueError, match="2 of its tokens have other ids"):
                make_drafter("speculate", args, model, 128)
        else:
            make_drafter("speculate", args, model, 128)
