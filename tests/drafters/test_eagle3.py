"""drafters/eagle3.py against a plain builder (plain_trees.py), for every variant of a head; and what the engine writes
with it."""
import os
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from eagle3_published import HEADS, names_of, write
from helpers import arguments, slow_but
from plain_trees import Builder, PlainHead3, check_cycles
from recorder import Recorder

import generate
from draft import Eagle2, Vanilla
from drafters.eagle1 import EAGLE1_TREE, Eagle1
from drafters.eagle3 import Eagle3Head
from drafters.heads import Quantize, load_head
from drafters.lookup import Retrieval
from drafters.methods import load_eagle, make_drafter
from engine import Engine
from model import Llama
from quant.linear import QuantizedLinear
from quantize import quantize_draft
from sampling import Sampling

SEEDS = int(os.environ.get("HEAD_SEEDS", 1))  # of random heads of each kind: 25 compare more than 200 cycles
UNSORTED = [17, 3, 9, 21, 0, 14, 6, 11, 2, 8, 19, 5, 23, 12]


def features_of(model: Llama, text: list[int], plain: PlainHead3) -> torch.Tensor:
    """What a head drafts from after each token of the text: [tokens, H]."""
    _, hidden = model.forward_with_taps(torch.tensor([text]), torch.arange(len(text)), taps=plain.cfg.taps)
    return torch.stack([plain.join(row) for row in hidden[0]])


def run(model: Llama, drafter: Eagle1 | Eagle2, seed: int) -> tuple[Recorder, list[int], Sampling]:
    """Decode with this drafter; seeds that are odd sample. Returns its cycles, the text, and how it was sampled."""
    recorder = Recorder(drafter)
    ids, sampling = tiny.prompt(seed, 3 + seed % 5), Sampling(temperature=float(seed % 2), seed=seed)
    return recorder, ids + sum(Engine(model, drafter, 96).generate(ids, 16, sampling), []), sampling


def builder_of(model: Llama, head: Eagle3Head, text: list[int], sampling: Sampling) -> Builder:
    plain = PlainHead3(head.state_dict(), head.cfg, head.vocab, model)
    return Builder(plain, text, features_of(model, text, plain), sampling)


@pytest.mark.slow
@pytest.mark.parametrize(("publisher", "flags"), HEADS, ids=names_of(HEADS))
def test_published_heads(publisher: str, flags: dict, tmp_path: Path) -> None:
    """Fails if a variant of a head, or a publisher's layout, computes anything else than the formulas: a norm that is
    left out, another residual, fc on its own predictions, ids taken for rows, a layer with the cache of another. A
    random head drafts in fp32, with odd seeds sampled, and every cycle is compared with the plain builder's."""
    close = cycles = 0
    first = HEADS.index((publisher, flags))
    for seed in range(first, first + SEEDS):
        model = tiny.target(seed, torch.float32, num_hidden_layers=8)
        expected = write(tmp_path / str(seed), publisher, model.cfg, seed, **flags | {"measured": True})
        head = load_head(tmp_path / str(seed), model)
        recorder, text, sampling = run(model, Eagle2(head, model, 20, 4, 3), seed)
        plain = PlainHead3(expected.tensors, expected.config, expected.ids, model)
        builder = Builder(plain, text, features_of(model, text, plain), sampling)
        grow = partial(builder.eagle2, draft_tokens=20, draft_depth=4, topk=3)
        found = check_cycles(recorder, builder, grow, 1e-3, margin=1e-3)  # without a last norm, logits of hundreds
        cycles, close = cycles + found[0], close + found[1]
    assert cycles > 8 * SEEDS and close <= cycles // 10


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_but(1, [(60, 8, 10), (2, 1, 1), (9, 8, 1), (64, 1, 10), (33, 2, 7),
                                               (128, 6, 10)]))
def test_trees(shape: tuple[int, int, int]) -> None:
    """Fails if a tree of another shape reads positions, slots or ancestors of another one."""
    model, head = tiny.pair3(3, ids=UNSORTED)
    recorder, text, sampling = run(model, Eagle2(head, model, *shape), 3)
    builder = builder_of(model, head, text, sampling)
    topk = min(shape[2], len(UNSORTED))
    check_cycles(recorder, builder, lambda length: builder.eagle2(length, shape[0], shape[1], topk), 1e-9)


def test_fixed_tree() -> None:
    """Fails if EAGLE-1's tree is grown from an EAGLE-3 head in another way than from an EAGLE-1 head."""
    model, head = tiny.pair3(5)
    recorder, text, sampling = run(model, Eagle1(head, model), 5)
    builder = builder_of(model, head, text, sampling)
    check_cycles(recorder, builder, lambda length: builder.eagle1(length, EAGLE1_TREE), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lookup", [False, True])
def test_text(temperature: float, lookup: bool) -> None:
    """Fails if the text is not plain decoding's, or if a head that guesses well gains little: the accepted drafts would
    be of other tokens, positions or noise."""
    gained = 0
    for seed in range(4):
        model, head = tiny.pair3(seed, 0.03)
        sampling, ids = Sampling(temperature, seed=seed), tiny.prompt(seed, 7)
        retrieval = Retrieval(6, "longest", torch.device("cpu")) if lookup else None
        cycles = list(Engine(model, Eagle2(head, model, 30, 5, 5, retrieval), 128).generate(ids, 60, sampling))
        assert sum(cycles, []) == sum(Engine(model, Vanilla(), 128).generate(ids, 60, sampling), [])
        gained += sum(map(len, cycles[1:])) / len(cycles[1:])
    assert gained / 4 > 2.5


def test_taps() -> None:
    """Fails if a tap is another layer's input, normed, or out of order: each is what the layers before it leave."""
    model, ids = tiny.target(1, num_hidden_layers=3), torch.tensor([tiny.prompt(1, 9)])
    model.allocate_rope(16)
    position = torch.arange(9)
    features, taps = model.forward_with_taps(ids, position, taps=(0, 2, 3))
    x = model.embed(ids)
    streams = [x]
    for layer in model.layers:
        x = layer(x, model.rope[:, :9], None, None, None)
        streams.append(x)
    assert torch.equal(taps, torch.cat((streams[0], streams[2], streams[3]), -1))
    plain, hidden = model.forward_with_taps(ids, position)
    assert torch.equal(features, plain) and hidden is plain


@pytest.mark.slow
def test_quantised() -> None:
    """Fails if a quantised head drafts from other products than its own weights' within rounding."""
    model, head = tiny.pair3(2, dtype=torch.float32)
    ids = tiny.prompt(2, 7)
    exact = list(Engine(model, Eagle2(head, model, 20, 4, 3), 128).generate(ids, 60))
    head.quantize("int8")
    rounded = list(Engine(model, Eagle2(head, model, 20, 4, 3), 128).generate(ids, 60))
    assert sum(rounded, []) == sum(exact, []) and len(rounded) <= len(exact) + 2


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_fc_is_not_quantised(mode: str) -> None:
    """Fails if fc is quantised, whose taps are too unlike for one scale of 8 bits; or if it is not where a file has it
    in integers, as the 1.5B's head here."""
    model, head = tiny.pair3(2, dtype=torch.float32)
    head.quantize(mode)
    assert type(head.fc) is torch.nn.Linear and isinstance(head.layers[0].wqkv, QuantizedLinear)
    with torch.device("meta"):
        stored = Eagle3Head(head.cfg, {name.replace("weight", "data") for name in tiny.PLAIN})
    stored.quantize(mode)
    assert isinstance(stored.fc, QuantizedLinear)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("ids", [None, UNSORTED])
def test_quantised_file(mode: str, ids: list[int] | None, tmp_path: Path) -> None:
    """Fails if what quantize.py writes of a head does not load, or drafts other trees than the head quantised while it
    is loaded: the draft vocabulary or what was measured would be lost."""
    model, head = tiny.pair3(2, dtype=torch.float32, ids=ids)
    folder = tiny.save_target(model, tmp_path / "x")
    tiny.save_head3(head, folder / "eagle3")
    file = quantize_draft(folder / "eagle3", folder, mode, 64)
    prompt, texts = tiny.prompt(2, 7), []
    for loaded in (load_head(file, model), load_head(folder / "eagle3", model, None, Quantize(mode, 64))):
        texts.append(list(Engine(model, Eagle2(loaded, model, 20, 4, 3), 128).generate(prompt, 60)))
        assert isinstance(loaded.layers[0].wo, QuantizedLinear) and loaded.cfg == head.cfg
    assert texts[0] == texts[1]


def test_the_other_kind_is_refused(tmp_path: Path) -> None:
    """Fails if --eagle3 drafts with an EAGLE-1/2 head or --eagle2 with an EAGLE-3 head, under a name that is not its
    own; or if --draft alone takes the wrong one of the two."""
    model, head = tiny.pair3(2, dtype=torch.float32)
    folder = tiny.save_target(model, tmp_path / "x")
    new = str(tiny.save_head3(head, folder / "new"))
    old = str(tiny.save_head(tiny.head(model), folder / "old"))
    for path, flag, other in ((new, "--eagle2", "--eagle3"), (old, "--eagle3", "--eagle2")):
        args = generate.parse_args(arguments(folder, flag, "--draft", path))
        with pytest.raises(ValueError, match=f"holds an EAGLE-.* head: use {other}"):
            make_drafter(args.method, args, model, 64)
        assert generate.parse_args(arguments(folder, "--draft", path)).method == other.removeprefix("--")
    assert generate.parse_args(arguments(folder, "--draft", new, "--lookup")).method == "eagle3+lookup"
    for path in (new, old):  # EAGLE-1's tree takes both
        args = generate.parse_args(arguments(folder, "--eagle", "--draft", path))
        assert type(make_drafter(args.method, args, model, 64)) is Eagle1


def test_what_is_left_open_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a head whose files leave fields open drafts with the likeliest ones and nobody is told, or if one that
    was tried out is called unsure."""
    model = tiny.target(num_hidden_layers=8)
    folder = tiny.save_head3(tiny.head3(model, taps=(2, 4, 5), rope_theta=1e6), tmp_path / "head")
    args = generate.parse_args(arguments(tmp_path, "--draft", str(folder), "--eagle3"))
    load_eagle(args, model)
    assert capsys.readouterr().err == ""
    (folder / "measured.json").unlink()
    load_eagle(args, model)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "rope_theta" in error and str(folder) in error


def test_dynamic_rope_ends() -> None:
    """Fails if a head's dynamic RoPE goes on as plain RoPE beyond the length up to which they are the same."""
    head = tiny.head3(tiny.target(), max_position_embeddings=64, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    head.allocate_cache(64)
    with pytest.raises(ValueError, match="beyond 64 tokens"):
        head.allocate_cache(65)
