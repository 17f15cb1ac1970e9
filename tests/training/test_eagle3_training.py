"""training/eagle3.py and training/memory.py: an unrolled step of an EAGLE-3 head, its loss, a new head, resuming
and going on from another head, and how much memory it takes.

Models of a few thousand weights on the CPU. As in test_trainer.py: a head that is trained on other positions, keys or
tokens than it drafts with learns well, and drafts badly.
"""
import argparse
import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from helpers import Letters, marked, read, tiny_command
from torch import Tensor

import train
from benchmarks.widen import FIELDS, widen_model
from draft import Eagle2
from drafters.eagle3 import PLAIN, Eagle3Head
from drafters.heads import load_head
from drafters.tree_size import read_curve
from formats.config import Config
from formats.eagle3 import open_eagle3, save_eagle3
from model import Llama, load_model, rope_table
from ops.attention import causal_mask
from quant.linear import quantize_linears
from quantize import quantize_draft
from training import commands, dialogues, eagle3, memory, steps, tapped, trainer
from training.commands import prepare
from training.dialogues import Script, unmark, write_dialogues
from training.eagle3 import OWN_SCORE, Eagle3Trainer, choose_taps, fc_inputs, frequent_tokens
from training.steps import unrolled
from training.tapped import channel_scales, draft_tokens
from training.trainer import Trainer
from tree import State

CPU = torch.device("cpu")
V = tiny.SHAPE["vocab_size"]
IDS = [1, 2, 4, 5, 8, 10, 11, 13, 17, 18, 22, 23]
FC_NORMS = (*PLAIN, *(f"fc_norms.{i}.weight" for i in range(3)))


def settings(tmp_path: Path, **changes) -> argparse.Namespace:
    values = {"length": 32, "batch": 8, "unroll": 4, "decay": 0.8, "places": 128, "lr": 0.05, "steps": 80,
              "minutes": math.inf, "out": tmp_path / "head", "held_out": 0, "draft_vocab": 12, "head_layers": None,
              "norms": None, "mlp": None, "kv_heads": None, "share_lm_head": None, "init": None, "regression": 0.0,
              "openers": None}
    return argparse.Namespace(**values | changes)


def saved_head(model: Llama, folder: Path, ids: list[int] | None = IDS, **changes) -> Path:
    head = tiny.head3(model, **{"ids": ids} | changes)
    save_eagle3(head.cfg, head.state_dict(), head.vocab, folder)
    return folder


def exact3(made: Eagle3Trainer) -> Eagle3Trainer:
    """helpers.exact for an EAGLE-3 head: float64, weights that make a difference, no optimizers."""
    tiny.randomise(made.module, 1, torch.float64)
    made.module.requires_grad_(True)
    made.module.tap_scale = torch.linspace(0.5, 2, len(made.module.tap_scale), dtype=torch.float64)
    made.rope = rope_table(made.layer_config, made.args.length).double()
    made.amp = contextlib.nullcontext()
    made.optimizers = []
    return made


def as_published(made: Eagle3Trainer) -> Eagle3Head:
    """The head as it is drafted with, in full precision: fc with the scales of the taps, and the ids by themselves."""
    state = made.module.state_dict()
    ids = state.pop("vocab", None)
    state["fc.weight"] = state["fc.weight"] * state.pop("tap_scale")
    head = Eagle3Head(made.module.cfg, state.keys()).double()
    head.load_state_dict(state)
    head.vocab = ids
    return head.requires_grad_(False)


@torch.no_grad()
def drafted(head: Eagle3Head, model: Llama, ids: list[int], place: int, depth: int) -> tuple[Tensor, Tensor]:
    """What the drafter, with its KV cache, takes from its predictions 1 to depth steps after position `place` [depth,
    H], and their logits [depth, Vd]. Token place + 1 is the newest committed one; the drafted tokens are the text's."""
    drafter = Eagle2(head, model, draft_depth=depth, topk=1)
    head.allocate_cache(64)
    tokens = torch.tensor(ids + [0] * depth)
    taps = model.forward_with_taps(torch.tensor([ids]), torch.arange(len(ids)), taps=drafter.taps)[1][0]
    pending = torch.cat((taps[place:place + 1], taps.new_zeros(depth, taps.shape[1])))
    state = State(tokens, torch.tensor(place + 2), pending, torch.tensor(1), torch.tensor(False), 64)
    if place:
        slots, mask = torch.arange(place), causal_mask(torch.tensor(0), place, place)
        drafter.prefill(state, taps[:place], slots, mask)
    found = [drafter.bound.read_logits(drafter.extend(state)[0], False)]
    for level in range(1, depth):
        slot = torch.tensor([place + level])  # of the chain's node `level`, which sees the chain up to itself
        h = drafter.bound.predict(tokens[slot + 1], found[-1][1], None, slot, slot, causal_mask(slot[0], 1, 64))
        found.append(drafter.bound.read_logits(h, False))
    logits, inputs = zip(*found)
    return torch.cat(inputs), torch.cat(logits)


# ----- A step and its loss -----------------------------------------------------------------------------------------

STEPS = {"plain": {}, "one step": {"unroll": 1}, "seven steps": {"unroll": 7, "shape": {"num_key_value_heads": 1}},
         "norms": {"norms": True}, "two layers": {"head_layers": 2, "unroll": 3}, "all tokens": {"draft_vocab": V},
         "key heads": {"kv_heads": 4, "head_layers": 2},
         "norms, two layers": {"norms": True, "head_layers": 2, "mlp": 20}, "shared": {"share_lm_head": True},
         "init, normed residual": {"head": {"norm_before_residual": True, "wide": (True, True), "norm_output": True}},
         "init, shared": {"head": {"names": ("fc.weight", "norm.weight")}},
         "init, biases": {"head": {"names": (*PLAIN, "fc.bias", "layers.0.wqkv.bias", "layers.0.w13.bias")}},
         "init, unsorted ids": {"head": {"ids": IDS[::-1], "num_attention_heads": 2, "num_key_value_heads": 1}}}


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS)
def test_unrolled_is_what_drafting_does(case: str, tmp_path: Path) -> None:
    """Fails if the head is trained on other positions, keys, tokens, norms or taps than it drafts with, if a layer sees
    another layer's keys, or if fc is applied to its own predictions. Recomputes the loss in plain Python: fails if the
    distribution is not renormalised over the draft tokens, or masked or other places count."""
    changes = dict(STEPS[case])
    model = tiny.target(num_hidden_layers=8, **changes.pop("shape", {}))
    if "head" in changes:
        taps = (2, 4, 5)
        changes |= {"init": saved_head(model, tmp_path / "init", taps=taps, **changes.pop("head")), "draft_vocab": None}
    data, args = marked(2, 15), settings(tmp_path, length=15, **changes)
    made = exact3(Eagle3Trainer(model, args, data.int()))
    original = made.unrolled
    predictions = []
    made.unrolled = lambda *inputs: predictions.append(original(*inputs)) or predictions[-1]
    total, agreements = made.train_step(data)
    steps, rows, head = args.unroll, 15 - args.unroll - 1, as_published(made)
    assert len(predictions) == steps and made.taps == (2, 4, 5)
    ids = list(range(V)) if head.vocab is None else head.vocab.tolist()
    hits, losses, counts = [0] * steps, [[] for _ in range(steps)], [0] * steps
    for b, row in enumerate(data.tolist()):
        text = [~t if t < 0 else t for t in row]
        target = tiny.logits(model, text).tolist()
        for s in range(rows):
            inputs, logits = drafted(head, model, text, s, steps)
            for j in range(1, steps + 1):
                found = predictions[j - 1][b, s]
                assert (found - inputs[j - 1]).norm() < 1e-4 * inputs[j - 1].norm(), (s, j)  # attention is float32
                if row[s + j + 1] < 0:
                    continue
                counts[j - 1] += 1
                if (row[s + j + 1]) not in ids:
                    continue
                best = max(ids, key=target[s + j].__getitem__)
                weights = [math.exp(target[s + j][i]) for i in ids]
                own = [math.exp(x) for x in logits[j - 1].tolist()]
                losses[j - 1].append(-sum(w * math.log(q / sum(own)) for w, q in zip(weights, own)) / sum(weights))
                hits[j - 1] += ids[own.index(max(own))] == best
    assert agreements.tolist() == pytest.approx([hit / count for hit, count in zip(hits, counts)])
    assert sum(map(len, losses)) < sum(counts) or len(ids) == V  # some places were masked
    assert total.item() == pytest.approx(sum(0.8**j * sum(x) / len(x) for j, x in enumerate(losses)), rel=1e-4)


def test_masked_places(tmp_path: Path) -> None:
    """Fails if anything is learned where the text goes on with a token that is no draft token, or if such places count
    as right or are left out of the agreement."""
    model, data = tiny.target(num_hidden_layers=4), unmark(marked(2, 15))
    ids = [i for i in range(V) if i not in data[0].tolist()]
    made = exact3(Eagle3Trainer(model, settings(tmp_path, length=15, init=saved_head(
        model, tmp_path / "init", ids, taps=(0, 2, 3)), draft_vocab=None), data.int()))
    total, agreements = made.train_step(data[:1])
    assert total == 0 and not agreements.any() and all(not p.grad.any() for p in made.module.parameters())
    total, agreements = made.train_step(data)
    assert total > 0 and any(p.grad.any() for p in made.module.parameters())


# ----- A new head --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [None, True])
def test_new_head(norms: bool | None, tmp_path: Path) -> None:
    """Fails if a new head does not predict what the target would from its top tap: another tap, a wrong norm, rows of
    other tokens, layers that change it much. Or if what it feeds back is of another size than what it reads first."""
    model = tiny.pair(5, 0.1, torch.float32, num_hidden_layers=8)[0]
    model.embed.weight.data[:, 3] *= 40  # a channel that is much larger than the others
    model.norm.weight.data.uniform_(0.5, 2)
    data = torch.tensor([tiny.prompt(seed, 32) for seed in range(8)], dtype=torch.int32)
    made = Eagle3Trainer(model, settings(tmp_path, norms=norms), data)
    head, tokens = as_published(made).float(), data[:2].long()
    taps = model.forward_with_taps(tokens, torch.arange(32), taps=made.taps)[1]
    top = taps[..., -32:]
    lens = model.lm_head(F.rms_norm(top, (32,), model.norm.weight, model.norm.eps))[..., head.vocab]
    first = head.join(taps)
    logits = head.lm_head(head.norm(first))
    assert F.cosine_similarity(logits, lens, -1).min() > 0.9999
    assert norms or torch.allclose(logits, lens, rtol=1e-2, atol=1e-2)
    keys, values = [[]], [[]]
    with torch.no_grad():
        h = made.unrolled(made.module, model.embed(tokens[:, 1:]), first[:, :-1], made.rope[:, :31].float(), keys,
                              values)
    agree = (made.module.lm_head(h if norms else made.module.norm(h)).argmax(-1) == lens[:, :-1].argmax(-1))
    assert agree.float().mean() > 0.95
    sizes = [x.square().mean(-1).sqrt().median().item() for x in (first, h)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2) and (norms or sizes[0] == pytest.approx(1, rel=0.1))
    read = fc_inputs(made.module, taps) * made.module.tap_scale
    assert 0.5 < read.abs().flatten(0, 1).median(0).values.median() < 2 and read.abs().max() < 100
    assert made.module.lm_head.weight.dtype == torch.float32
    assert torch.equal(made.module.lm_head.weight, model.lm_head.weight[head.vocab])


def test_channels_of_zeros(tmp_path: Path) -> None:
    """Fails if a target whose channels are zeros for the most part makes an infinite scale, and so a loss that is no
    number. Channels of zeros change no other one's scale."""
    shape = dict(zip(FIELDS, (V, 80, 128, 8, 12, 3, 16)))  # 47 of 80 channels are zeros
    model = widen_model(tiny.target(dtype=torch.float32, num_hidden_layers=8, rms_norm_eps=0.05), shape)
    made = Eagle3Trainer(model, settings(tmp_path), marked(8, 32).int())
    assert made.train_step(marked(8, 32))[0].isfinite()
    assert all(p.isfinite().all() for p in made.module.parameters())
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(channel_scales(F.pad(x, (0, 40)))[:33], channel_scales(x))


def test_new_tokens_see_themselves(tmp_path: Path) -> None:
    """Fails if not every second key head attends to its own row at first, with a score of OWN_SCORE, or the others do.
    """
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=8, **shape)
    layer = Eagle3Trainer(model, settings(tmp_path), marked(8, 32).int()).module.layers[0]
    x = layer.embed_norm(model.embed(unmark(marked(4, 32))).float()).flatten(0, 1)
    q, k, _ = (x @ layer.wqkv.weight[:, :32].T).unflatten(-1, (-1, layer.head_dim)).split((8, 4, 4), 1)
    scores = (q * k.repeat_interleave(2, 1)).sum(-1).mean(0) / layer.head_dim**0.5  # [8]
    assert scores.tolist() == pytest.approx([OWN_SCORE, OWN_SCORE, 0, 0] * 2, abs=0.8)


def test_shapes(tmp_path: Path) -> None:
    """Fails if an option does not reach the head, or the head takes norms, a RoPE scaling or a window from the target
    that its format cannot express."""
    data = marked(8, 32).int()
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=8, model_type="qwen3", rope_theta=300.0)
    made = Eagle3Trainer(model, settings(tmp_path, head_layers=2, mlp=20, norms=True), data)
    cfg, head = made.module.cfg, made.module
    assert cfg.layer.num_layers == 2 and cfg.wide == (True, False) and cfg.norm_output and len(head.fc_norms) == 3
    assert head.layers[1].w2.in_features == 20 and head.layers[1].wqkv.in_features == 32
    assert head.layers[0].q_norm is None and cfg.layer.rope_theta == 300.0 and cfg.draft_vocab_size == 12
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}
    for shape in ({"rope_scaling": scaling}, {"model_type": "mistral", "sliding_window": 64}):
        model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=8, **shape)
        made = Eagle3Trainer(model, settings(tmp_path, draft_vocab=None), data)
        layer = made.layer_config
        assert layer.rope_scaling is None and layer.sliding_window is None and layer.intermediate_size == 48
        assert made.module.cfg.draft_vocab_size == V and made.module.vocab is None and made.draft_rows.ids is None


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_that_are_not_listed(shared: bool, tmp_path: Path) -> None:
    """Fails if a head that drafts with the model's rows cannot learn tokens of its dialogues that are not listed, or
    one with rows of its own learns where it has none."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4, vocab_size=400)
    made = Eagle3Trainer(model, settings(tmp_path, draft_vocab=100, share_lm_head=shared or None), marked(8, 32).int())
    tokens = torch.randint(24, 400, (2, 16), generator=torch.Generator().manual_seed(0))
    tokens[torch.isin(tokens, made.module.vocab)] = 399
    assert 399 not in made.module.vocab
    rows, known = made.draft_rows.ids, made.known(tokens)
    assert torch.equal(known.nonzero().flatten(), rows.sort().values) and len(rows) == (356 if shared else 100)
    assert known[tokens].all() if shared else not known[tokens].any()
    assert torch.equal(made.target_rows, model.lm_head.weight[rows])
    assert (made.predict(tokens)[0] > 0) == shared


def test_taps() -> None:
    """Fails if other layers are tapped than the published ones, or the same twice, or ones that SGLang misreads."""
    assert choose_taps(32) == (2, 16, 29) and choose_taps(7) == (2, 3, 4)
    for count in range(2, 7):
        taps = choose_taps(count)
        assert len(set(taps)) == 3 and sorted(taps) == list(taps) and taps[0] != 1 and taps[-1] <= count
    with pytest.raises(ValueError, match="1 layer: train --kind eagle$"):
        choose_taps(1)


def test_draft_vocabulary() -> None:
    """Fails if tokens of users or templates count, rarer tokens are taken, or the ids are not ascending."""
    data = torch.tensor([[7, 7, 3, ~5, ~5, ~5, 7], [3, 2, 9, 9, 9, 9, ~1]], dtype=torch.int32)
    assert frequent_tokens(data, 2, 12).tolist() == [7, 9]
    assert frequent_tokens(data, 3, 12).tolist() == [3, 7, 9]
    assert frequent_tokens(data, 6, 12).tolist() == [0, 1, 2, 3, 7, 9]  # tokens that never occur fill it up
    assert frequent_tokens(data, 12, 12) is None
    assert frequent_tokens(torch.tensor([[0, 0, 3, ~1, ~1, ~1]]), 1, 12).tolist() == [0]


# ----- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"norms": True, "head_layers": 2}])
def test_training_learns(changes: dict, learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if the loss has the wrong sign or no gradient, the optimizers miss parameters, or the target is trained."""
    model, data = learnable
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(0)
    made = Eagle3Trainer(model, settings(tmp_path, draft_vocab=20, steps=140, **changes), data)
    start = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    agreements = []
    for made.step in range(100):
        agreements.append(made.train_step(data[made.step % 32 * 8:][:8])[1])
    first, last = torch.stack(agreements[:5]).mean(0), torch.stack(agreements[-10:]).mean(0)
    assert (last > first + 0.2).all(), (first, last)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not [name for name, p in made.module.named_parameters() if torch.equal(p, start[name])]


def test_optimizers(tmp_path: Path) -> None:
    """Fails if Muon gets the lm_head, whose rows are tokens, or a parameter has no optimizer or two."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    made = Eagle3Trainer(model, settings(tmp_path, norms=True), marked(8, 32).int())
    muon, adam = (optimizer.param_groups for optimizer in made.optimizers)
    assert [[p is made.module.lm_head.weight for p in group["params"]] for group in adam][1] == [True]
    assert [group["initial_lr"] for group in (*muon, *adam)] == pytest.approx([0.05, 0.01, 0.0025])
    found = [id(p) for group in (*muon, *adam) for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in made.module.parameters())
    assert all(group["weight_decay"] == 0 for group in adam)


@pytest.mark.slow
def test_stopped_and_resumed(learnable: tuple[Llama, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if stopping loses weights, momentum, the scales of the taps or the draft vocabulary: what is saved must be
    what a run saves that is not stopped, even if other dialogues, whose tokens have other counts, were added since."""
    model, data = learnable
    clock = itertools.count(0, 20)  # 20 s pass between two looks, so that each step saves
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def begin(name: str, counted: Tensor) -> Eagle3Trainer:
        torch.manual_seed(0)
        return Eagle3Trainer(model, settings(tmp_path, steps=6, places=20, out=tmp_path / name / "head"), counted)

    begin("whole", data).run(data, tmp_path / "whole")
    stopped = begin("parts", data)
    step, calls = stopped.train_step, itertools.count(1)
    stopped.train_step = lambda batch: step(batch) if next(calls) < 4 else [][0]
    with pytest.raises(IndexError):
        stopped.run(data, tmp_path / "parts")
    resumed = begin("parts", torch.arange(V).repeat(8, 2)[:, :32])
    counted = resumed.module.vocab.clone()
    resumed.resume(tmp_path / "parts")
    assert resumed.step == 3 and not torch.equal(resumed.module.vocab, counted)
    assert torch.equal(resumed.target_rows, model.lm_head.weight[stopped.module.vocab])
    assert torch.equal(resumed.draft_rows.ids, stopped.draft_rows.ids) and len(resumed.draft_rows.ids) == 12
    resumed.run(data, tmp_path / "parts")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole/head" / file).read_bytes() == (tmp_path / "parts/head" / file).read_bytes()
    for changes in ({"draft_vocab": 14}, {"draft_vocab": V}, {"head_layers": 2}, {"norms": True}, {"mlp": 20}):
        with pytest.raises(ValueError, match=r"parts/state\.pt: damaged, or of a training with other options"):
            Eagle3Trainer(model, settings(tmp_path, **changes), data).resume(tmp_path / "parts")


def test_state_of_another_head(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if the state of one --init is taken for that of another one, whose tensors have the same shapes: the head
    would be exported with a wrong config."""
    model, data = learnable
    paths = [saved_head(model, tmp_path / str(flag), norm_before_residual=flag, taps=(0, 2, 3))
             for flag in (False, True)]
    first, second = (Eagle3Trainer(model, settings(tmp_path, init=path, draft_vocab=None), data) for path in paths)
    first.save(tmp_path / "work")
    with pytest.raises(ValueError, match="damaged, or of a training with other options .its head has another config"):
        second.resume(tmp_path / "work")
    first.resume(tmp_path / "work")
    state = torch.load(tmp_path / "work/state.pt", weights_only=True)
    del state["config"]  # as older versions wrote it
    torch.save(state, tmp_path / "work/state.pt")
    first.resume(tmp_path / "work")


def test_init_goes_on(learnable: tuple[Llama, Tensor], tmp_path: Path) -> None:
    """Fails if a head that training starts from loses its draft vocabulary, or is changed before the first step."""
    model, data = learnable
    path = saved_head(model, tmp_path / "init", IDS[::-1], names=FC_NORMS, norm_output=True, taps=(0, 2, 3))
    args = settings(tmp_path, init=path, draft_vocab=None)
    made = Eagle3Trainer(model, args, data)
    assert made.module.vocab.tolist() == IDS[::-1] and all(p.dtype == torch.float32 for p in made.module.parameters())
    made.export()
    before, after = open_eagle3(path, model.cfg), open_eagle3(args.out, model.cfg)
    assert before.config == after.config and torch.equal(before.ids, after.ids)
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.allclose(tensor.float(), after.tensors[name].float(), rtol=1e-2, atol=0), name
    assert not torch.equal(made.module.fc.weight, load_head(path, model).fc.weight.float())  # it reads scaled taps


@pytest.mark.parametrize("option, value, says", [
    ("draft_vocab", 14, "--draft_vocab 14: the head in .* has 12"), ("head_layers", 2, "--head_layers 2: .* has 1"),
    ("norms", True, "--norms True: .* has False"), ("mlp", 20, "--mlp 20: .* has 48"),
    ("kv_heads", 4, "--kv_heads 4: .* has 2"),
    ("share_lm_head", True, "--share_lm_head True: .* has False"),
    ("draft_vocab", 25, "--draft_vocab takes 10 to 24"), ("draft_vocab", 9, "--draft_vocab takes 10 to 24")])
def test_init_does_not_fit(option: str, value: int, says: str, tmp_path: Path) -> None:
    """Fails if an option that contradicts the head is ignored."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    args = settings(tmp_path, init=saved_head(model, tmp_path / "init", taps=(0, 2, 3)), draft_vocab=None)
    Eagle3Trainer.check(args, model.cfg)
    with pytest.raises(ValueError, match=says):
        Eagle3Trainer.check(argparse.Namespace(**vars(args) | {option: value}), model.cfg)


def test_init_with_a_list(tmp_path: Path) -> None:
    """Fails if a head that drafts all tokens is trained on as one of the tokens that the list beside it has."""
    model = tiny.target(num_hidden_layers=8)
    folder = saved_head(model, tmp_path / "init", None, taps=(2, 4, 5))
    (folder / "draft_vocab.json").write_text(json.dumps(list(range(12))))
    made = Eagle3Trainer(model, settings(tmp_path, init=folder, draft_vocab=None), marked(8, 32).int())
    assert made.module.vocab is None and len(made.target_rows) == V


def test_init_refused(tmp_path: Path) -> None:
    """Fails if a head of another target or another kind is started from, or one with parts that are not trained, or if
    the latter is refused only after the dialogues were written."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    other = saved_head(tiny.target(dtype=torch.bfloat16, num_hidden_layers=4, vocab_size=25), tmp_path / "other")
    eagle = tiny.save_head(tiny.head(model), tmp_path / "eagle")
    for path, says in ((other, "another model's"), (eagle, "EAGLE-1/2"), (tmp_path / "none", "no draft head there")):
        with pytest.raises((ValueError, OSError), match=says):
            Eagle3Trainer.check(settings(tmp_path, init=path, draft_vocab=None), model.cfg)
    names = {"an embedding of its own": (*PLAIN, "embed.weight"), "no last norm": ("fc.weight", "lm_head.weight"),
             "one norm for all taps": (*PLAIN, "input_norm.weight")}
    for says, parts in names.items():
        path = saved_head(model, tmp_path / says, names=parts, taps=(0, 2, 3))
        args = settings(tmp_path, init=path, draft_vocab=None)
        for refused in (partial(eagle3.trainable, path, model), partial(Eagle3Trainer.check, args, model.cfg)):
            with pytest.raises(ValueError, match=f"a head that has {says} cannot be trained on here"):
                refused()
    small = quantize_draft(saved_head(model, tmp_path / "small", taps=(0, 2, 3)),
                           tiny.save_target(model, tmp_path / "model"), "int8", 0)
    args = settings(tmp_path, init=small, draft_vocab=None)
    with pytest.raises(ValueError, match="a head that has quantised weights cannot be trained on here"):
        Eagle3Trainer.check(args, model.cfg)


# ----- Memory ------------------------------------------------------------------------------------------------------


class Count:
    """The bytes of the storages that are kept, and the most that were kept at one time. Those in `known` do not count.
    """

    def __init__(self, known: set[int]) -> None:
        self.known = known
        self.users = Counter()
        self.sizes = {}
        self.most = 0


class Kept:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, count: Count, tensor: Tensor) -> None:
        self.count, self.tensor, self.key = count, tensor, tensor.untyped_storage()._cdata
        if self.key not in count.known:
            count.users[self.key] += 1
            count.sizes[self.key] = tensor.untyped_storage().nbytes()
            count.most = max(count.most, sum(count.sizes.values()))

    def __del__(self) -> None:
        self.count.users[self.key] -= 1
        if self.count.users[self.key] == 0:
            del self.count.sizes[self.key]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Trainer, Eagle3Trainer])
def test_what_autograd_keeps(kind: type[Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the formula forgets a large part of what autograd keeps, or counts one twice. The functions are compiled
    as for a GPU as far as what is kept is decided, and what they keep at one time is counted."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 512}
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4, **sizes)
    for batch, places, layers, unroll, logits in ((4, 100, 1, 3, 10**6),
                                                  (8, 2000, 1 + (kind is Eagle3Trainer), 1, 100_000)):
        torch._dynamo.reset()
        monkeypatch.setattr(steps, "LOGITS", logits)
        args = settings(tmp_path, length=80, batch=batch, places=places, head_layers=layers, unroll=unroll,
                        draft_vocab=256)
        data = torch.randint(512, (batch, 80), dtype=torch.int32)
        made = kind(model, args, data)
        for name in {"unrolled", "distill", "join"} & vars(made).keys():
            setattr(made, name, torch.compile(getattr(made, name), backend="aot_eager_decomp_partition", dynamic=False,
                                              fullgraph=True))
        known = {p.untyped_storage()._cdata for p in (*made.module.parameters(), *model.parameters())}
        count = Count(known)
        with torch.autograd.graph.saved_tensors_hooks(partial(Kept, count), lambda kept: kept.tensor):
            total, _ = made.predict(data.long())
        need = memory.training_need(made, batch)
        expected = need.steps * unroll / (unroll + 1) + need.loss / 2
        assert 0.8 < count.most / expected < 1.15, (batch, places, layers)


def test_what_a_head_takes(tmp_path: Path) -> None:
    """Fails if weights, gradients or a state of the optimizers are forgotten, or the target is counted wrongly."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    made = Eagle3Trainer(model, settings(tmp_path), marked(8, 32).int())
    total, _ = made.predict(marked(8, 32))
    total.backward()
    gradients = sum(p.grad.nbytes for p in made.module.parameters())
    made.train_step(marked(8, 32))
    states = sum(t.nbytes for optimizer in made.optimizers for state in optimizer.state.values()
                 for t in state.values() if torch.is_tensor(t) and t.ndim)
    need = memory.training_need(made, 8)
    assert need.head == gradients + states + sum(p.nbytes for p in made.module.parameters())
    features, taps = model.forward_with_taps(unmark(marked(8, 32)), torch.arange(32), taps=made.taps)
    assert need.hidden == features.nbytes + taps.nbytes
    weights = sum(p.nbytes for p in model.parameters()) + 12 * 32 * 2  # and the rows of 12 draft tokens
    assert need.target == weights + 2 * 8 * 32 * (4 * 32 + 3 * 48) + model.rope.nbytes


def test_batches_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a batch is made smaller without need or without a line, if one is tried that does not fit, or if an
    option is advised that changes nothing."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    made = Eagle3Trainer(model, settings(tmp_path), marked(8, 32).int())
    need = {batch: sum(memory.training_need(made, batch)) for batch in (1, 2, 4, 8)}
    monkeypatch.setattr(memory, "USABLE", 1.0)
    for free, batch in ((need[8], 8), (need[8] - 1, 4), (need[4], 4), (need[2] - 1, 1)):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert memory.fit_batch(made) == batch
        said = capsys.readouterr().out.splitlines()
        assert said[-1].startswith("memory: about 0.00 GB of 0.00 GB (target 0.00 GB, head")
        assert said[:-1] == ([] if batch == 8 else [
            f"--batch {batch}: 8 would need {need[8] / 1e9:.1f} GB, and {free / 1e9:.1f} GB can be used"])
    monkeypatch.setattr(memory, "free_bytes", lambda device: need[1] - 1)
    says = r"^out of memory: --batch 1 needs 0\.0 GB, and 0\.0 GB are free; a smaller --length needs less"
    with pytest.raises(ValueError, match=f"{says}, and train.py --target_quantize int8 halves the model$"):
        memory.fit_batch(made)
    made.own_options = ("anchors",)
    with pytest.raises(ValueError, match="a smaller --length or --anchors needs less"):
        memory.fit_batch(made)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    quantize_linears(model, "int8")
    with pytest.raises(ValueError, match="--generate_batch 1 needs .* are free; a smaller --length needs less$"):
        memory.fit_generate_batch(model, 8, 48)


@pytest.mark.slow
def test_dialogues_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if the cache that is allocated is larger than what was counted, or dialogues get lost where fewer are
    written at a time."""
    model = tiny.target(dtype=torch.bfloat16, num_hidden_layers=4)
    script = Script(Letters(), CPU)
    free = memory.generating_need(model, 48, 4)
    monkeypatch.setattr(memory, "USABLE", 1.0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    allocate = Llama.allocate_cache
    caches = []
    monkeypatch.setattr(Llama, "allocate_cache", lambda self, *sizes: (
        allocate(self, *sizes), caches.append(self.kv.nbytes)))
    write_dialogues(model, script, tmp_path / "d", 10, 48, 8)
    weights = sum(p.nbytes for p in model.parameters())
    assert caches[0] * 48 // 128 <= free - weights  # the cache has 128 slots, a multiple of the bucket
    assert len(read(tmp_path / "d", 48)) == 10
    out = capsys.readouterr().out
    assert out.startswith("--generate_batch 4: 8 would need") and out.count("dialogues ") == 3
    write_dialogues(model, script, tmp_path / "d", 10, 48, 8)
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_quantised_target(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a target in int8 has other features, taps or logits than its weights allow, or cannot be trained on."""
    model = tiny.pair(3, 0.1, torch.bfloat16, num_hidden_layers=4, tie_word_embeddings=tied)[0]
    if tied:
        model.lm_head.weight = model.embed.weight
    folder = tiny.save_target(model, tmp_path / "model")
    monkeypatch.setattr(commands, "Tokenizer", lambda path: Letters())
    args = settings(tmp_path, checkpoint=folder, device="cpu", work=tmp_path / "work", tokens=600, generate_batch=4,
                    length=48, batch=4, draft_vocab=V)
    precision = torch.get_float32_matmul_precision()
    quantised, _, data = prepare(args, "int8")
    torch.set_float32_matmul_precision(precision)
    assert quantised.lm_head.weight.dtype == torch.bfloat16
    assert (quantised.lm_head.weight is quantised.embed.weight) == tied
    model.allocate_rope(48)
    tokens, positions = torch.tensor([tiny.prompt(1, 48)]), torch.arange(48)
    for a, b in zip(model.forward_with_taps(tokens, positions, taps=(2, 3)),
                    quantised.forward_with_taps(tokens, positions, taps=(2, 3))):
        assert ((a - b).norm(dim=-1) / a.norm(dim=-1)).median() < 0.05
    made = Eagle3Trainer(quantised, args, data)
    assert made.train_step(marked(4, 48))[0] > 0
    assert memory.training_need(made, 4).target < memory.training_need(
        Eagle3Trainer(model, args, data), 4).target + 2 * V * 48


# ----- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    yield from tiny_command(train.main, tmp_path, monkeypatch)


@pytest.mark.slow
def test_command_from_start_to_end(command, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the dialogues are written once for each kind, a kind takes the other's state or folder, a run that
    --minutes ends leaves no evaluated head, or the last line is missing."""
    folder = command("--steps", 3)
    data = (folder / "training/dialogues.bin").read_bytes()
    capsys.readouterr()
    words = ("--kind", "eagle3", "--draft_vocab", 12)
    command(*words, "--minutes", 1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("dialogues") for line in lines) and "memory: about 0.0" in lines[0]
    assert lines[1].startswith("tokens per step on 2 held-out dialogues: greedy ")
    assert lines[-1].startswith("tokens per step 1.00 -> 1.") and lines[-1].endswith(
        "(2 held-out prompts, a tree of 8 nodes and 4 levels)") and ", tokens/s " in lines[-1]
    assert (folder / "training/dialogues.bin").read_bytes() == data
    assert {p.name for p in (folder / "training").iterdir()} == {"dialogues.bin", "dialogues.length", "eagle",
                                                               "eagle3"}
    assert {p.name for p in (folder / "eagle3").iterdir()} == {"model.safetensors", "config.json", "measured.json",
                                                               "acceptance.json"}
    model = load_model(folder)
    assert isinstance(load_head(folder / "eagle3", model), Eagle3Head) and read_curve(folder / "eagle3")
    first = open_eagle3(folder / "eagle3", model.cfg)
    assert len(first.ids) == 12 and not first.doubts
    command(*words, "--steps", 4, "--eval_prompts", 0)
    assert "resuming at step 1" in capsys.readouterr().out
    assert torch.equal(open_eagle3(folder / "eagle3", model.cfg).ids, first.ids)
    command(*words, "--steps", 0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("tokens per step 1.00 -> ")
    assert not (folder / "eagle3/draft_vocab.json").exists()


def test_how_many_draft_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a new head drafts another number of tokens than --draft_vocab says, where 0 means all."""
    monkeypatch.setattr(tapped, "DRAFT_VOCAB", 14)
    cfg = tiny.target(num_hidden_layers=8).cfg
    asked = (None, 12, 0, V)
    assert [draft_tokens(settings(tmp_path, draft_vocab=n), cfg) for n in asked] == [14, 12, V, V]


@pytest.mark.slow
def test_a_list_beside_a_head(command, tmp_path: Path) -> None:
    """Fails if a trained head that drafts all tokens gets no draft_vocab.json, or one with a draft vocabulary of its
    own gets one or lets another one be asked for."""
    words = ("--kind", "eagle3", "--eval_prompts", 0, "--steps")
    folder = command(*words, 1, "--draft_vocab", 12)
    with pytest.raises(ValueError, match="has a draft vocabulary of 12 tokens, which --draft_vocab cannot change"):
        command(*words, 0, "--draft_vocab", 11)
    command(*words, 0, "--draft_vocab", 12)
    assert not (folder / "eagle3/draft_vocab.json").exists()
    vocab_size = Config.load(folder).vocab_size
    out = ("--out", tmp_path / "all", "--work", tmp_path / "work")
    command(*words, 1, *out, "--share_lm_head", "--draft_vocab", vocab_size)
    assert not (tmp_path / "all/draft_vocab.json").exists()
    command(*words, 0, *out, "--draft_vocab", 12)
    assert len(load_head(tmp_path / "all", load_model(folder)).vocab) == 12
    (tmp_path / "all/draft_vocab.json").unlink()
    command(*words, 2, *out, "--share_lm_head", "--draft_vocab", vocab_size)
    assert not (tmp_path / "all/draft_vocab.json").exists()


@pytest.mark.slow
def test_old_state(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if the state of an EAGLE-1/2 head that lies where older versions wrote it is lost, or taken for one of the
    other kind."""
    folder = command("--steps", 2, "--eval_prompts", 0)
    (folder / "training/eagle/state.pt").rename(folder / "training/state.pt")
    capsys.readouterr()
    command("--kind", "eagle3", "--draft_vocab", 12, "--steps", 2, "--eval_prompts", 0)
    assert "resuming" not in capsys.readouterr().out
    command("--steps", 2, "--eval_prompts", 0)
    assert "resuming at step 2" in capsys.readouterr().out and not (folder / "training/state.pt").exists()


@pytest.mark.slow
def test_curve(command, capsys: pytest.CaptureFixture) -> None:
    """Fails if the agreement is not measured on held-out dialogues at the steps that were asked for, measuring changes
    the training, or a resumed run loses what was measured before."""
    words = ("--kind", "eagle3", "--draft_vocab", 12, "--eval_prompts", 0, "--unroll", 2)
    folder = command(*words, "--steps", 100, "--held_out", 50)
    out = capsys.readouterr().out
    assert out.count("\nstep ") == 1 and out.count("  held out ") == 1 and "tokens/s  held out " in out
    path = folder / "training/eagle3/curve.json"
    (row,) = json.loads(path.read_text())
    assert row["step"] == 100 and len(row["agreement"]) == 2 and row.keys() == {"step", "seconds", "loss", "agreement"}
    measured = (folder / "eagle3/model.safetensors").read_bytes()
    command(*words, "--steps", 200, "--held_out", 150)
    assert [row["step"] for row in json.loads(path.read_text())] == [100, 200]
    of_training = float(re.search(r"step 100 .*loss ([\d.]+)", out)[1])  # printed with three decimals
    assert abs(row["loss"] - of_training) > 0.0006
    command(*words, "--steps", 100, "--held_out", 0, "--work", folder / "other", "--out", folder / "o")
    assert not (folder / "other/eagle3/curve.json").exists()
    assert (folder / "o/model.safetensors").read_bytes() == measured


@pytest.mark.slow
def test_interrupted(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if Ctrl-C loses what was learned, or ends in more than one line."""
    step, calls = Trainer.train_step, itertools.count()

    def interrupted(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step(self, batch)
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    for kind in train.KINDS:
        calls = itertools.count()
        with pytest.raises(SystemExit) as stopped:
            command("--kind", kind, "--steps", 9)
        err = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 130 and err[-1].startswith("stopped at step 2: ") and err[-1].endswith(
            f"{kind} is written; the same command goes on with training")
        folder = tmp_path / "model"
        assert torch.load(folder / "training" / kind / "state.pt", weights_only=True)["step"] == 2
        load_head(folder / kind, load_model(folder))


@pytest.mark.parametrize("words, says", [
    (["--kind", "eagle3", "--draft_vocab", "25"], "--draft_vocab takes 10 to 24 tokens"),
    (["--draft_vocab", "25"], "--draft_vocab takes 10 to 24 tokens"),
    (["--kind", "eagle3", "--regression", "0.1"], "--regression is no option of --kind eagle3"),
    (["--norms"], "--norms is no option of --kind eagle"), (["--init", "x"], "--init is no option of --kind eagle"),
    (["--mlp", "8"], "--mlp is no option of --kind eagle"),
    (["--length", "5"], "--unroll 4 does not fit into dialogues of --length 5: it takes 1 to 3"),
    (["--kind", "eagle3", "--unroll", "0"], "--unroll 0 does not fit into dialogues of --length 48: it takes 1 to 46"),
    (["--kind", "eagle3", "--kv_heads", "3"], "--kv_heads 3: must divide the model's 4 query heads evenly"),
    (["--kind", "eagle3", "--init", "nowhere"], "nowhere: no draft head there")])
def test_refused_before_anything_is_written(words: list[str], says: str, command, tmp_path: Path) -> None:
    """Fails if an option is ignored, or refused only after the dialogues were written."""
    with pytest.raises((ValueError, OSError), match=says):
        command(*words)
    assert not (tmp_path / "model/training").exists()


def test_no_answers_and_too_few_layers(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if training begins with nothing to learn from, or on a target that has no three depths."""
    monkeypatch.setattr(dialogues.Script, "step", lambda self, turns, sampled: ~torch.full_like(sampled, 1))
    for kind in train.KINDS:
        with pytest.raises(ValueError, match="no dialogue has an answer to learn from"):
            command("--kind", kind, "--draft_vocab", 12)
    tiny.save_target(tiny.target(dtype=torch.bfloat16, num_hidden_layers=1), tmp_path / "model")
    with pytest.raises(ValueError, match="this target has 1 layer"):
        command("--kind", "eagle3")


def test_out_of_memory(command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a GPU that is too small ends in a traceback, or a mistake in the code does not."""
    def broken(text: str) -> Callable:
        def fail(*_: object) -> None:
            raise RuntimeError(text)
        return fail
    monkeypatch.setattr(train, "write_and_train", broken("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(ValueError, match="^out of memory: use a --batch below 4, or a --generate_batch below 10$"):
        command()
    monkeypatch.setattr(train, "write_and_train", broken("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        command()


def test_full_disk(learnable: tuple[Llama, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a full disk is reported as anything but an OSError, which a command shows in one line."""
    model, data = learnable
    args = settings(tmp_path, steps=1)
    made = Eagle3Trainer(model, args, data)

    def full(state: dict, file) -> None:
        file.write(b"x")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        made.run(data, tmp_path / "work")
    assert not (tmp_path / "work").exists() and not args.out.exists()


def test_eagle_is_unrolled_as_before() -> None:
    """Fails if the attention that both kinds share is given the input of an EAGLE-1/2 layer with a norm."""
    model = tiny.target()
    head = tiny.head(model)
    rope = rope_table(head.cfg, 5).double()
    x, features = torch.randn(2, 1, 5, 32, dtype=torch.float64)
    found = unrolled(head, x, features, rope, [], [])
    assert torch.allclose(found, head(head.fc(torch.cat((x, features), -1)), rope), atol=1e-5)
