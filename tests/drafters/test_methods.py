"""drafters/methods.py and app/options.py: each row of the table makes its drafter, with the sizes asked for, from
flags, from --method and from Engine.load; what does not fit is refused in one line."""
import json
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from helpers import FLAGS, arguments, tiny_checkpoint

import generate
from app.answer import setting
from app.batch import METHOD_FLAGS
from app.memory import empty_drafter, stored_model
from app.options import Engine, load_engine
from draft import Eagle2, Vanilla
from drafters import methods
from drafters.block import Block
from drafters.eagle1 import Eagle1
from drafters.heads import LARGE, Quantize, load_head
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup
from drafters.medusa import Medusa, MedusaHeads, save_medusa
from drafters.methods import BASELINE, METHODS, make_drafter
from drafters.speculate import Speculate
from model import Llama
from quant.linear import is_quantized

KINDS = {"vanilla": Vanilla, "lookup": Lookup, "lookahead": Lookahead, "medusa": Medusa, "speculate": Speculate,
         "eagle": Eagle1, "eagle2": Eagle2, "eagle3": Eagle2, "block": Block}


def method_words(method: str, folder: Path) -> list[str]:
    """The flags that name a method, its weights being in `folder`."""
    return [str(folder / word) if word in (".", "medusa") else word for word in FLAGS[method]]


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, checkpoint: tuple[Path, Llama]) -> None:
    """Fails if flags or --method make another drafter than the one they name, if a retrieval or a rule gets lost, or if
    a drafter changes the text."""
    folder, model = checkpoint
    words = method_words(method, folder)
    weights = METHODS[method].weights
    needed = words[:2] if weights and weights.option in ("medusa", "speculate") else []
    args = generate.parse_args(arguments(folder, "--method", method, *needed))
    assert vars(args) == vars(generate.parse_args(arguments(folder, *words))) | {
        flag: False for flag in METHOD_FLAGS - {BASELINE}}
    assert args.method == method
    drafter = make_drafter(method, args, model, 128)
    assert type(drafter) is KINDS[method.partition("+")[0]] and drafter.rejection_sampling == ("rejection" in method)
    if method != "lookup":
        assert bool(getattr(drafter, "retrieval", None)) == ("lookup" in method)
    ids = tiny.prompt(1, 9)
    text = sum(Engine(model, drafter, 128).generate(ids, 30), [])
    assert text == sum(Engine(model, Vanilla(), 128).generate(ids, 30), [])


@pytest.fixture(scope="module")
def loadable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a tokenizer and all heads."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("loadable"))
    save_medusa(MedusaHeads(tiny.SHAPE["hidden_size"], 4), folder / "medusa")
    return folder


OPTIONS = {"speculate+lookup": {"chain": 6, "lookup_rule": "pld"}, "eagle2": {"draft_tokens": 9, "draft_topk": 2},
           "lookahead": {"window": (3, 3, 2)}, "eagle": {"quantize": "int4", "group": 64}, "lookup": {"chain": None}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_load(method: str, loadable: Path) -> None:
    """Fails if Engine.load makes another engine than the command line does with the same options."""
    given = OPTIONS.get(method, {})
    flags = [word for name, value in given.items() if value is not None for word in (
        f"--{name}", *map(str, value if isinstance(value, tuple) else [value]))]
    words = method_words(method, loadable)
    plain = load_engine(generate.parse_args(arguments(loadable, *words, *flags)))
    tokenizer = plain.tokenizer
    parts = {name: loadable / name for name in ("medusa",) if method == name}
    parts |= {"speculate": str(loadable)} if "speculate" in method else {}
    engine = Engine.load(str(loadable), method, device="cpu", **parts, **given)
    assert type(engine.drafter) is type(plain.drafter) and engine.tokenizer.stop_ids == tokenizer.stop_ids
    for name in ("num_nodes", "max_depth", "noise_depth", "rejection_sampling"):
        assert getattr(engine.drafter, name) == getattr(plain.drafter, name), name
    assert engine.max_seq_len == plain.max_seq_len == 512 and engine.stop_ids.tolist() == sorted(tokenizer.stop_ids)
    assert engine.model.embed.weight.dtype == plain.model.embed.weight.dtype
    ids = engine.tokenizer.chat([{"role": "user", "content": "Why?"}])
    assert [*engine.generate(ids, 30)] == [*plain.generate(ids, 30)]


def test_load_what_is_asked_for(loadable: Path) -> None:
    """Fails if an argument of Engine.load is ignored, or if a subclass's load does not make one of the subclass."""
    class Mine(Engine):
        pass
    for dtype in ("float16", torch.float16):
        engine = Mine.load(loadable, "eagle", dtype=dtype, max_seq_len=99, head=loadable / "eagle", device="cpu")
        assert type(engine) is Mine and engine.max_seq_len == 99 and engine.model.embed.weight.dtype == torch.float16
    assert Engine.load(loadable, device=torch.device("cpu")).device.type == "cpu"
    with pytest.raises(FileNotFoundError, match="nohead"):
        Engine.load(loadable, "eagle", head="nohead")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Engine.load(loadable / "nowhere")


@pytest.mark.parametrize("words, device, weights", [
    ((), "cuda", ("int8", LARGE)), ((), "cpu", (None, LARGE)), (("--quantize", "int8"), "cpu", ("int8", 0)),
    (("--quantize", "int8dyn"), "cpu", ("int8", 0)), (("--quantize", "int4", "--group", "64"), "cuda", ("int8", 0)),
    (("--draft_weights", "int8"), "cpu", ("int8", 0)), (("--draft_weights", "stored"), "cuda", (None, 0)),
    (("--draft_weights", "stored", "--quantize", "int8"), "cuda", (None, 0))])
def test_weights_of_a_head(words: tuple, device: str, weights: tuple, loadable: Path, monkeypatch) -> None:
    """Fails if a head is quantised where that is slower or not asked for, or is not where it should be; and if the
    memory that is planned is another head's."""
    args = generate.parse_args(arguments(loadable, "--eagle2", *words))
    mode, group, least = methods.weights_of_head(args, device)
    assert (mode, least) == weights and group == 128
    for large, quantised in ((10**6, mode is not None and least == 0), (100, mode is not None)):
        monkeypatch.setattr(methods, "LARGE", large)
        model = stored_model(loadable / "model.safetensors", torch.float32)
        drafter = empty_drafter(args, model, 64, args.quantize, device)
        assert is_quantized(drafter.head) == quantised


def test_text_with_an_int8_head(loadable: Path) -> None:
    """Fails if a head in int8 beside a model that is not quantised changes the text, or is not in int8."""
    made = {name: Engine.load(loadable, "eagle2", device="cpu", draft_weights=name) for name in ("int8", "stored")}
    assert [is_quantized(engine.drafter.head) for engine in made.values()] == [True, False]
    assert not any(is_quantized(engine.model) for engine in made.values())
    assert "draft head in int8, float32" in setting(made["int8"]) and "int8" not in setting(made["stored"])
    model = made["stored"].model
    int4 = Eagle2(load_head(loadable / "eagle", model, quantize=Quantize("int4", 32)), model)
    assert "draft head in int4, float32" in setting(Engine(model, int4, 64))
    ids = made["int8"].tokenizer.chat([{"role": "user", "content": "Why?"}])
    texts = [sum(engine.generate(ids, 40), []) for engine in (*made.values(), Engine.load(loadable, device="cpu"))]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("options, message", [
    ({"draft": "eagle4"}, "eagle4 is no method"), ({"chain": 3}, "--chain is for"), ({"dtype": "float64"}, "--dtype"),
    ({"quantize": "int5"}, "--quantize: invalid choice: 'int5'"), ({"draft_tokens": 2.5}, "--draft_tokens"),
    ({"device": "mps"}, "--device"), ({"max_seq_len": 1}, "--max_seq_len"), ({"medusa": "x"}, "--medusa is for"),
    ({"draft": "medusa"}, "--medusa DIR is missing"), ({"draft": "lookahead", "window": (1, 2)}, "--window"),
    ({"draft": "lookup", "chain": True}, "--chain"), ({"draft": "eagle", "speculate": "x"}, "--speculate is for"),
    ({"draft": "lookup", "tree_table": True}, "--tree_table"), ({"draft_tokens": 8}, "--draft_tokens")])
def test_load_refuses(options: dict, message: str, loadable: Path) -> None:
    """Fails if Engine.load makes something of options that do not fit, or raises SystemExit, which would end somebody's
    program."""
    with pytest.raises(ValueError, match=message):
        Engine.load(loadable, **options)
    with pytest.raises(TypeError, match="no option 'draft_token': there are chain, "):
        Engine.load(loadable, **options, draft_token=8)


@cache
def plain_text(length: int, slots: int) -> tuple[list[int], list[int]]:
    """A prompt and how the model of `checkpoint` continues it up to the last slot, without a cache and chunks."""
    model, ids, text = tiny.pair(0, 0.1, torch.float32)[0], tiny.prompt(length, length), []
    while len(ids + text) < slots:
        text.append(int(tiny.logits(model, ids + text)[-1].argmax()))
    return ids, text


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_limits(method: str, checkpoint: tuple[Path, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a drafter changes the text at a limit: prompts of one token, of whole chunks and one more or less, of
    all slots but one; texts up to the last slot, where no tree fits any more; stop ids within an accepted path."""
    folder, model = checkpoint
    monkeypatch.setattr("engine.PREFILL_CHUNK", 8)
    args = generate.parse_args(arguments(folder, *method_words(method, folder)))
    parts, slots = {}, 40
    for length in (1, 2, 7, 8, 9, 15, 16, 17, 33, slots - 2, slots - 1):
        ids, text = plain_text(length, slots)
        fast = Engine(model, make_drafter(method, args, model, slots, parts), slots)
        assert sum(fast.generate(ids, 1000), []) == text
        for stop in {*text[1:12:2]} if length in (1, 8, 17) else {}:
            fast = Engine(model, make_drafter(method, args, model, slots, parts), slots, frozenset({stop, 999}))
            assert sum(fast.generate(ids, 1000), []) == text[:text.index(stop) + 1]
    for wrong in ([], tiny.prompt(0, slots)):
        with pytest.raises(ValueError, match="prompt"):
            list(fast.generate(wrong, 1))


def test_sizes(checkpoint: tuple[Path, Llama]) -> None:
    """Fails if a size is not passed on: --draft_tokens counts the root, --chain does not."""
    folder, model = checkpoint
    for method, words, nodes in (("lookup", ("--chain", "4"), 5), ("eagle2", ("--draft_tokens", "5"), 5),
                                 ("speculate", ("--chain", "9"), 10), ("lookup", (), 11), ("speculate", (), 6),
                                 ("lookahead", ("--window", "3", "3", "2"), 10)):
        args = generate.parse_args(arguments(folder, *method_words(method, folder), *words))
        assert make_drafter(method, args, model, 128).num_nodes == nodes


def test_parts_are_loaded_once(checkpoint: tuple[Path, Llama], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if methods that share weights load them more than once."""
    folder, model = checkpoint
    args, parts, loads = generate.parse_args(arguments(folder, "--eagle2")), {}, []
    load = methods.load_head
    monkeypatch.setattr(methods, "load_head", lambda *inputs: loads.append(1) or load(*inputs))
    made = [make_drafter(method, args, model, 128, parts) for method in ("eagle", "eagle2", "eagle2+lookup")]
    assert len(loads) == 1 and all(drafter.head is made[0].head for drafter in made)


def test_heads_of_other_kinds(checkpoint: tuple[Path, Llama]) -> None:
    """Fails if a row takes a head that it cannot draft with, or EAGLE-1's tree refuses an EAGLE-3 head."""
    folder, model = checkpoint
    for method, head, message in (("eagle", "block", "holds a block head: use --block"), ("eagle", "eagle3", ""),
                                  ("eagle2", "eagle3", "holds an EAGLE-3 head: use --eagle3"),
                                  ("speculate", "eagle", "holds an EAGLE-1/2 head, not a model")):
        option = "--speculate" if method == "speculate" else "--draft"
        args = generate.parse_args(arguments(folder, "--method", method, option, str(folder / head)))
        if message:
            with pytest.raises(ValueError, match=message):
                make_drafter(method, args, model, 128)
        else:
            make_drafter(method, args, model, 128)


@pytest.mark.slow
def test_refused(checkpoint: tuple[Path, Llama], demo: Path, tmp_path: Path) -> None:
    """Fails if a draft model whose tokens have other ids is accepted, or if missing weights are not asked for by
    name."""
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


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize("method, least", [("medusa", 2.35), ("speculate", 4.5)])
def test_demo_peers(method: str, least: float, demo: Path, demo_model: Llama, demo_runs) -> None:
    """Fails if the Medusa heads or the draft model in heads/ are read wrongly or draft one position off: the text would
    be the same, with fewer tokens per step. Here Medusa has 2.59 and the draft model 5.0."""
    heads = ROOT / "heads/SmolLM2-135M-Instruct"
    args = generate.parse_args(arguments(demo))
    args.medusa, args.speculate = heads / "medusa", heads / "draft_model"
    engine, gained = Engine(demo_model, make_drafter(method, args, demo_model, 512), 512, frozenset([2])), []
    for cycles, text, _ in demo_runs[:2]:
        ids = text[:len(text) - sum(map(len, cycles))]
        mine = list(engine.generate(ids, 36))
        assert ids + sum(mine, []) == text
        gained += map(len, mine[1:])
    assert sum(gained) / len(gained) > least
