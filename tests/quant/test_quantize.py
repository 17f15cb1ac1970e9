"""quant/ and quantize.py: integers that stand for the weights, files that load as they were written, text that does not
depend on the drafter, and refusals. tests/ops/test_quantized.py tests the kernels that read the integers.

    python -m pytest tests/quant
"""
import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import quantize
from benchmarks import quality as quality_module
from benchmarks.quality import kept, perplexity, quality
from benchmarks.workload import gigabytes
from convert_hf_checkpoint import staged
from draft import Eagle2, Vanilla
from drafters.eagle1 import Eagle1
from drafters.heads import Quantize, load_head
from engine import Engine
from formats import weights
from formats.eagle import VOCAB
from model import load_model
from ops.linear import linear, linear_torch
from ops.quantized import Quantized, dequantize, pack, rotate, unpack
from quant.int4 import SHRINK, nearest_integers, search_scales
from quant.linear import GROUPS, MODES, QuantizedLinear, quantize_linears, quantize_weight
from quantize import quantize_checkpoint, quantize_draft, quantize_layer, write_text
from sampling import Sampling

FORMATS = [("int8", 128), ("int8dyn", 128), ("int4", 128), ("int4", 64)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(weight: Quantized, K: int) -> Tensor:
    """The weights that the integers stand for, fp32 [N, K], rotated back."""
    w = dequantize(weight, torch.float32)[:, :K]
    return rotate(w) if weight.rotated else w


def correlated(K: int, rows: int = 4096) -> Tensor:
    """Correlated inputs [rows, K] of very different sizes, whose means are far from zero."""
    common = random(rows, K // 4, seed=1) @ random(K // 4, K, seed=2) / 8
    return common + random(K, seed=3).exp() * (random(rows, K, seed=4) / 4 + 0.3)


def modes_of(model: nn.Module) -> list[tuple[int, int, bool]]:
    """Group, planes and rotation of every quantised linear."""
    return [tuple(m.how) for m in model.modules() if isinstance(m, QuantizedLinear)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint with a draft head, in bf16 like converted ones."""
    model = tiny.target(5, torch.bfloat16, hidden_size=64, intermediate_size=192, vocab_size=40)
    tiny.save_head(tiny.head(model), tiny.save_target(model, tmp_path / "ck") / "eagle")
    return tmp_path / "ck"


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the tokenizer by the few attributes that quantize.py reads, and make the texts shorter."""
    bpe = SimpleNamespace(token_to_id=lambda token: None)
    monkeypatch.setattr(quantize, "Tokenizer", lambda folder: SimpleNamespace(
        bpe=bpe, bos_id=3, stop_ids={5}, model_ids=range(40)))
    monkeypatch.setattr(quantize, "LENGTH", 64)


def test_pack() -> None:
    """Fails if a column is packed into the wrong half of a byte: column k goes into the low half of byte k, or into the
    high half of byte k - K / 2."""
    q = torch.arange(3 * 512).view(3, 512) * 7 % 16 - 8
    data = pack(q)
    assert data.shape == (3, 256) and data.dtype == torch.int8
    assert torch.equal(unpack(Quantized(data, torch.ones(4, 3, 2), 128, 2)), q.to(torch.int8))
    assert data[1, 5] & 15 == q[1, 5] & 15 and data[1, 5] >> 4 == q[1, 5 + 256]
    assert pack(q[:, :300]).shape == (3, 256), "filled up to a multiple of 256"


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", FORMATS)
@pytest.mark.parametrize("K", [64, 576, 256])
def test_error(mode: str, group: int, K: int) -> None:
    """Fails if a scale, an offset or the rotation is wrong: a step of the wrong size, a group shifted by one, the scale
    of another row. A weight may differ by half a step at most, and the layer must compute with the integers' weights,
    compared in float64."""
    w = random(96, K) * random(96, 1, seed=1).exp()
    x = random(7, K, seed=2)
    bias = random(96, seed=3)
    weight = quantize_weight(w, mode, group)
    assert (weight.group, weight.planes, weight.rotated) == {
        "int8": (0, 2, False), "int8dyn": (0, 1, True), "int4": (group, 2, False)}[mode]
    again = plain(weight, K)
    if mode == "int4":  # a shrunken range may clip outliers
        step = 16 * weight.scale[:-(-K // group), :, 0].float().T.repeat_interleave(group, 1)[:, :K]
        assert ((again - w).abs() <= step * 0.53).float().mean() > 0.98
        assert (again - w).norm() < {64: 0.1, 128: 0.12}[group] * w.norm()
    else:
        difference = rotate(again) - rotate(w) if weight.rotated else again - w
        assert (difference.abs() <= weight.scale[:, None] * 0.501).all()
    exact = x.double() @ again.double().T + bias.double()
    for y, most in ((linear_torch(x, weight, bias), 1e-5), (linear(x, weight, bias), 2e-4)):  # 14 bits
        assert (y - exact).abs().max() < (0.02 if mode == "int8dyn" else most) * exact.abs().max()
    assert torch.equal(linear(x, weight, bias), QuantizedLinear(weight, nn.Parameter(bias))(x))


def test_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the loop over blocks of rows writes a block to the wrong rows, or forgets the last rows."""
    w = random(100, 192)
    in_one_block = [quantize_weight(w, *how) for how in FORMATS]
    monkeypatch.setattr("quant.linear.ROWS", 48)
    for how, before in zip(FORMATS, in_one_block):
        assert all(torch.equal(a, b) for a, b in zip(quantize_weight(w, *how)[:2], before[:2]))


@pytest.mark.parametrize("hessian", [False, True])
def test_zeros_stay(hessian: bool) -> None:
    """Fails if a zero weight becomes nonzero, which would wake neurons that benchmarks/widen.py adds as zeros: zeros
    beside other weights in a group, an offset that is only nearly a multiple of the scale, a group of zeros alone."""
    w = random(64, 512)
    w[:, 64:100] = w[:, 128:256] = w[:, 300:510] = 0
    x = correlated(512)
    x[:, 64:70] = 0  # inputs that are always 0
    weight = quantize_weight(w, "int4", 128, None if not hessian else x.T @ x / len(x))
    again = plain(weight, 512)
    assert again.isfinite().all()
    dead = (w == 0).all(0)
    assert (again[:, 128:256].abs() < 1e-28).all() and (hessian or (again[:, dead].abs() < 1e-28).all())


@pytest.mark.slow
def test_gptq_beats_search_beats_nearest() -> None:
    """Fails if int4 loses its quality: scales that ignore the inputs, errors passed on with the wrong sign, to columns
    that are done already, or in another order than the Hessian's."""
    K = 320  # 2.5 groups
    w = random(128, K)
    w *= 1 + 4 * (random(128, K, seed=9) > 2)  # a few outliers
    x = correlated(K) * random(K, seed=20).mul(1.5).exp()
    hessian = x.T @ x / len(x)
    errors = {}
    for name, how in {"nearest": dict(shrink=(1,)), "search": {}, "gptq": dict(hessian=hessian)}.items():
        again = plain(quantize_weight(w, "int4", 128, **how), K)
        errors[name] = float(((again - w) @ x.T).norm()), float((again - w).pow(4).sum())
    assert errors["gptq"][0] < 0.25 * min(errors["search"][0], errors["nearest"][0]), "0.3 if columns are not sorted"
    assert errors["search"][1] < errors["nearest"][1]


def test_scales_know_the_inputs() -> None:
    """Fails if the search for scales ignores the importance of columns, or does not shrink ranges: the weighted error
    must be below that of a search with equal importance, and below that of the whole range."""
    w = random(64, 200)
    importance = random(200, seed=1).mul(2).exp()
    errors = []
    for assumed, shrink in ((torch.ones(200), SHRINK), (importance, (1,)), (importance, SHRINK)):
        scale, offset = search_scales(w, 64, assumed, shrink)
        q = nearest_integers(w, scale, offset, 64)
        s, o = (t.T.repeat_interleave(64, 1)[:, :200] for t in (scale, offset))
        errors.append(float(((q * s + o - w).square() * importance).sum()))
        assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(offset, offset.bfloat16().float())
    assert errors[2] < 0.6 * errors[0] and errors[2] < 0.9 * errors[1], "0.77 without regression"


def test_gptq_is_the_plain_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the updates of later columns depend on the size of the blocks: any size must give what one column at a
    time gives."""
    w, x = random(32, 192), correlated(192)
    hessian = x.T @ x / len(x)
    data = []
    for columns in (1, 50, 128, 1000):
        monkeypatch.setattr("quant.int4.COLUMNS", columns)
        data.append(unpack(quantize_weight(w, "int4", 64, hessian)))
    assert all((data[0] != d).float().mean() < 0.01 for d in data[1:])  # fp32 rounding decides ties


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", FORMATS)
@pytest.mark.parametrize("tied", [False, True])
def test_file(mode: str, group: int, tied: bool, tmp_path: Path, tokenizer) -> None:
    """Fails if a file does not load as exactly what was written: names, shapes, dtypes, metadata. The lm_head must be
    int8 in any mode and all else unchanged, also when the embeddings are tied."""
    model = tiny.target(2, torch.bfloat16, hidden_size=64, vocab_size=40, tie_word_embeddings=tied)
    source = tiny.save_target(model, tmp_path)
    path = quantize_checkpoint(source, mode, group, "cpu")
    assert path.name == f"model-{mode}.safetensors" and sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", path.name, "model.safetensors"]
    with safe_open(path, "pt") as f:
        metadata, names = f.metadata(), set(f.keys())
    assert metadata["mode"] == mode and metadata["group"] == str(group if mode == "int4" else 0)
    assert {"lm_head.data", "lm_head.scale", "embed.weight"} <= names and "lm_head.weight" not in names
    again, on_load = load_model(path, dtype=torch.float32), load_model(source, "cpu", torch.float32, mode, group)
    assert modes_of(again) == modes_of(on_load) and len(modes_of(again)) == 4 * 2 + 1
    assert tuple(again.lm_head.how) == (0, 2, False)
    assert again.embed.weight.dtype == torch.float32 and torch.equal(again.embed.weight, model.embed.weight.float())
    for (name, a), b in zip(again.state_dict().items(), on_load.state_dict().values(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if mode != "int4" or "lm_head" in name:  # int4 in a file is calibrated, int4 on load is not
            assert torch.equal(a, b), name
    ids = tiny.prompt(0, 30, 40)
    with torch.inference_mode():
        exact = tiny.logits(model.float(), ids)
        error = (tiny.logits(again, ids) - exact).norm() / exact.norm()
    assert error < (0.8 if mode == "int4" else 0.2), "attention is sharp in a tiny model"


@pytest.mark.slow
def test_one_tensor_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the integers of one tensor are still in memory when those of the next are made: a 13B would not fit."""
    alive = []
    write_file = weights.write_file

    def count_int8() -> int:
        return sum(type(o) is Tensor and o.dtype == torch.int8 and not o.is_meta for o in gc.get_objects())

    def write_and_count(path, like, pieces, *rest) -> None:
        def counted():
            for piece in pieces:
                gc.collect()
                alive.append(count_int8())
                yield piece
                del piece
        write_file(path, like, counted(), *rest)

    gc.collect()
    gc.freeze()  # what other tests left is not gone through for each tensor, nor counted
    before = count_int8()
    monkeypatch.setattr(quantize, "write_file", write_and_count)
    quantize_checkpoint(folder, "int8", 128, "cpu")
    assert len(alive) > 20 and max(alive) <= before + 1


@pytest.mark.slow
@torch.inference_mode()
def test_layers_run_as_quantised_so_far(folder: Path) -> None:
    """Fails if calibration passes wrong hidden states on: the next layer must get what the new weights make of the
    quantised copy, and what the old weights make of the original copy. Fails too if the corrected weights do not bring
    the two copies closer together."""
    model = load_model(folder, dtype=torch.float32)
    model.allocate_cache(64)
    layer, rope = model.layers[0], model.rope[:, :48]
    y = random(24, 48, 64)
    x = y + 0.3 * random(24, 48, 64, seed=1)
    quantized_x, original_x = x.clone(), y.clone()
    new_weights = dict(zip(("wqkv", "wo", "w13", "w2"), quantize_layer(layer, quantized_x, original_x, rope, 64)))
    assert torch.allclose(layer(y, rope, None, None, None), original_x, atol=1e-4)
    for name, weight in new_weights.items():
        assert isinstance(getattr(layer, name), nn.Linear), "the old layer must not change"
        setattr(layer, name, QuantizedLinear(weight))
    assert torch.allclose(layer(x, rope, None, None, None), quantized_x, atol=1e-4)
    layer = load_model(folder, dtype=torch.float32).layers[0]
    uncorrected_x, same_x = x.clone(), y.clone()
    for _ in quantize_layer(layer, uncorrected_x, same_x, rope, 64, correction=0):
        pass
    assert torch.equal(same_x, original_x)
    difference = (quantized_x - original_x).norm()
    assert difference < 0.83 * (uncorrected_x - original_x).norm(), "0.84 without y - x"


@pytest.mark.slow
def test_the_model_writes_the_text(folder: Path) -> None:
    """Fails if the text for calibration is not sampled from the model itself, differs for the same seed, or is the same
    in all rows."""
    model = load_model(folder, dtype=torch.float32)
    text = write_text(model, 3, 16, 70, 1)
    assert text.shape == (16, 70) and (text[:, 0] == 3).all() and torch.equal(text, write_text(model, 3, 16, 70, 1))
    assert len({tuple(row) for row in text.tolist()}) == 16
    own, other = (perplexity(model, t) for t in (text, torch.randint(40, text.shape)))
    assert own < 0.8 * other


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", FORMATS)
@pytest.mark.parametrize("draft_mode", ["same", "none"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_lossless(mode: str, group: int, draft_mode: str, temperature: float) -> None:
    """Fails if the text depends on the drafter when the target is quantised: it must be plain decoding's."""
    model, head = tiny.pair(7, 0.1, torch.float32, vocab_size=40, hidden_size=64)
    quantize_linears(model, mode, group)
    if draft_mode == "same":
        head.quantize(mode, group)
        head.vocab = torch.arange(0, 40, 2)
    sampling = Sampling(temperature, seed=4)
    ids = tiny.prompt(3, 12, 40)
    tokens_per_step = []
    want = sum(Engine(model, Vanilla(), 128).generate(ids, 40, sampling), [])
    for drafter in (Eagle2(head, model, 16, 4, 4), Eagle1(head, model)):
        cycles = list(Engine(model, drafter, 128).generate(ids, 40, sampling))
        assert sum(cycles, []) == want
        tokens_per_step.append(len(want) / len(cycles))
    assert len(want) == 40
    assert max(tokens_per_step) > 1.3 or temperature or draft_mode == "same", "nothing was drafted"


@pytest.mark.slow
@pytest.mark.parametrize("mode, group", FORMATS)
def test_draft_head(mode: str, group: int, folder: Path) -> None:
    """Fails if a head's file is wrong: fc cut into two halves, the embedding's half exact, the other half and the layer
    as integers. Or if the list of frequent tokens beside it is not read."""
    target, ids = load_model(folder), list(range(1, 37, 3))
    (folder / "eagle" / VOCAB).write_text(json.dumps(ids))
    before = Eagle2(load_head(folder / "eagle", target), target)
    path = quantize_draft(folder / "eagle", folder, mode, group)
    assert path == folder / "eagle" / f"model-{mode}.safetensors"
    head, on_load = load_head(path, target), load_head(folder / "eagle", target, None, Quantize(mode, group))
    assert modes_of(head) == modes_of(on_load) and len(modes_of(head)) == 5
    tensors = on_load.state_dict()
    assert head.state_dict().keys() == tensors.keys()
    assert all(torch.equal(t, tensors[name]) for name, t in head.state_dict().items())
    after = Eagle2(head, target)
    assert torch.equal(after.bound.fc_of_token, before.bound.fc_of_token) and isinstance(after.bound.fc, Quantized)
    assert isinstance(after.bound.lm_head, Quantized) and after.bound.lm_head.shape == (12, 64)
    error = plain(after.bound.fc, 64) - before.bound.fc.float()
    assert error.norm() < (0.12 if mode == "int4" else 0.01) * before.bound.fc.float().norm()
    assert (after.bound.lm_head_and_fc is None) == (mode == "int4")  # int8 rows and int4 rows cannot be stacked
    features = random(3, 64, seed=5)
    outputs = after.bound.read_logits(features, False)
    for found, weight in zip(outputs, (after.bound.lm_head, after.bound.fc), strict=True):
        exact = features @ plain(weight, 64).mT
        assert (found - exact).norm() < 0.03 * exact.norm()
    logits, nothing = after.bound.read_logits(features, True)
    assert nothing is None and logits.shape == (3, 12)
    quantize_linears(target, mode, group)
    rows = plain(Eagle2(head, target).bound.lm_head, 64)
    wanted = dequantize(target.lm_head.weight, torch.float32)[ids]
    assert (rows - wanted).norm() < 0.01 * wanted.norm()


def test_moves_and_bytes() -> None:
    """Fails if .to(dtype) changes integers or scales, or if the benchmarks miscount the bytes of a quantised layer."""
    for mode, group, size in (("int8", 128, 32 * 512 + 32 * 4), ("int4", 64, 32 * 256 + 8 * 32 * 4)):
        quantized = nn.ModuleDict({"a": nn.Linear(512, 32), "lm_head": nn.Linear(512, 8, bias=False)})
        quantize_linears(quantized, mode, group)
        before = quantized["a"].weight
        quantized.to(torch.float16)
        weight = quantized["a"].weight
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(weight[:2], before[:2]))
        assert quantized["a"].bias.dtype == torch.float16
        assert gigabytes(weight) == pytest.approx(size * 1e-9)
        assert gigabytes(quantized) == pytest.approx((size + 32 * 2 + 8 * 512 + 8 * 4) * 1e-9)


@pytest.mark.slow
def test_quality_numbers(folder: Path) -> None:
    """Fails if the numbers of benchmarks/quality.py are wrong: a model agrees with all of its own text, a broken one
    with less; perplexity counts every token but the first of a chunk once."""
    model = load_model(folder, dtype=torch.float32)
    prompts = [tiny.prompt(i, 10 + i, 40) for i in range(3)]
    texts = [sum(Engine(model, Vanilla(), 64).generate(ids, 30), []) for ids in prompts]
    assert kept(model, prompts, texts) == 1
    chunks = torch.tensor([tiny.prompt(9, 32, 40), tiny.prompt(8, 32, 40)])
    with torch.inference_mode():
        losses = [-tiny.logits(model, row).log_softmax(-1)[i, row[i + 1]] for row in chunks.tolist() for i in range(31)]
    assert perplexity(model, chunks) == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    model.layers[0].w2.weight.data.mul_(-1)
    assert kept(model, prompts, texts) < 0.9


def test_quality_table(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Fails if a perplexity is compared with another one than bf16's, or if a step reads something else than the layers
    and the lm_head."""
    scores, shares = iter((10.0, 11.0, 9.0)), iter((1.0, 0.75, 0.5))
    ids = SimpleNamespace(encode=lambda text: [1, 2, 3, 4] * 9, dialogue=lambda turns: [1, 2], stop_ids=frozenset())
    models = [(name, load_model(folder)) for name in ("bf16", "b", "c")]
    for name, stand_in in {"LENGTH": 8, "Tokenizer": lambda folder: ids, "perplexity": lambda *how: next(scores),
                           "kept": lambda *how: next(shares), "gigabytes": lambda *parts: len(parts),
                           "variants": lambda *how: models}.items():
        monkeypatch.setattr(quality_module, name, stand_in)
    (tmp_path / "x").write_text('{"turns": ["Why?"]}')
    quality(folder, [tmp_path / "x"], tmp_path / "x", 34, 2, 64, "cpu")
    assert capsys.readouterr().out.splitlines() == [
        "| 32 tokens of text | perplexity | over bf16 | greedy tokens kept | GB per step |", "|---|---|---|---|---|",
        "| bf16 | 10.000 | +0.00% | 100.0% | 2.000 |", "| b | 11.000 | +10.00% | 75.0% | 2.000 |",
        "| c | 9.000 | -10.00% | 50.0% | 2.000 |"]


def test_quality_variants(folder: Path) -> None:
    """Fails if a row of the table is of another mode, or int4 without the search for scales is int4 with it."""
    models = dict(quality_module.variants(folder, 64, "cpu"))
    assert {name: modes_of(model)[:1] for name, model in models.items()} == {"bf16": []} | {
        name: modes_of(load_model(folder, "cpu", None, mode, 64))[:1] for name, mode in (
            ("int8", "int8"), ("int8dyn", "int8dyn"), ("int4 of 64, nearest", "int4"), ("int4 of 64", "int4"))}
    nearest, searched = (models[name].layers[0].w2.weight for name in ("int4 of 64, nearest", "int4 of 64"))
    assert not torch.equal(nearest.scale, searched.scale)


def test_quality_needs_unquantised_weights(folder: Path) -> None:
    """Fails if figures of a quantised download are printed as those of bf16 and of modes made from it."""
    rewrite(folder / "model.safetensors", lambda tensors, metadata: metadata.update(mode="int8", group="0"))
    with pytest.raises(ValueError, match="so there is no bf16 to compare with"):
        quality(folder, [], folder, 512, 2, 128, "cpu")


def rewrite(path: Path, change) -> None:
    """Write a file again after change(tensors, metadata)."""
    with safe_open(path, "pt") as f:
        tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
        metadata = f.metadata()
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("wrong, words", [
    ("twice", "holds int8 already"), ("on load", "holds int8 already"), ("another mode", "holds int8 already"),
    ("group", "in the file's mode"), ("mode", "int3 in groups"), ("no mode", "lacks"), ("truncated", "damaged"),
    ("unknown group", "groups of 16"), ("floats", "torch.int8"), ("head twice", "holds int8 already"),
    ("not converted", "not a conv")])
def test_refusals(wrong: str, words: str, folder: Path) -> None:
    """Fails if integers can be read with another meaning than they were written with, or if the error is not one line
    that names the file."""
    path = quantize_checkpoint(folder, "int8", 128, "cpu")
    head = quantize_draft(folder / "eagle", folder, "int8", 128)
    changes = {"mode": lambda t, m: m.update(mode="int3"), "no mode": lambda t, m: m.pop("mode"),
               "floats": lambda t, m: t.update({"lm_head.data": t["lm_head.data"].float()}),
               "not converted": lambda t, m: m.pop("format"),
               "unknown group": lambda t, m: m.update(mode="int4", group="16"),
               "group": lambda t, m: m.update(mode="int4", group="64")}
    if wrong in changes:
        rewrite(path, changes[wrong])
    elif wrong == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=words) as error:
        if wrong == "twice":
            quantize_checkpoint(path, "int8", 128, "cpu")
        elif wrong == "on load":
            load_model(path, quantize="int8dyn")
        elif wrong == "another mode":
            quantize_checkpoint(path, "int4", 64, "cpu")
        elif wrong == "head twice":
            quantize_draft(head, folder, "int4", 128)
        else:
            load_model(path)
    assert "\n" not in str(error.value)
    assert str(head if wrong == "head twice" else path) in str(error.value)


def test_other_modes_and_groups() -> None:
    """Fails if a mistyped mode or group is taken for a default."""
    for mode, group in (("int5", 128), ("int4", 96), ("int4", 0)):
        with pytest.raises(ValueError, match="int5|96|groups of 0"):
            quantize_weight(random(4, 256), mode, group)
    assert MODES == ("int8", "int8dyn", "int4") and GROUPS == (32, 64, 128)


@pytest.mark.slow
def test_nothing_is_left_behind(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails if a failed run leaves a half-written file, or if a new conversion keeps the quantised file of the old
    model."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--checkpoint", str(folder), "--mode", "int8"])
    with pytest.raises(OSError, match="GB needed"):
        quantize.main()
    assert not list(folder.glob("model-int8*"))
    monkeypatch.undo()
    calls = []

    def failing(*args) -> Quantized:
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return quantize_weight(*args)

    monkeypatch.setattr(quantize, "quantize_weight", failing)
    with pytest.raises(OSError, match="No space"):
        quantize_checkpoint(folder, "int8", 128, "cpu")
    assert not list(folder.glob("model-int8*"))
    monkeypatch.undo()
    path = quantize_checkpoint(folder, "int8", 128, "cpu")
    with staged(folder, folder):
        pass
    assert not path.exists(), "the model that it was made from is gone"


def test_head_of_a_model_file(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if --draft does not find the head of a checkpoint that is given by its model file."""
    for checkpoint in (folder, folder / "model.safetensors"):
        monkeypatch.setattr(sys, "argv", ["quantize.py", "--checkpoint", str(checkpoint), "--mode", "int8", "--draft",
                                          "--device", "cpu"])
        quantize.main()
        path = folder / "eagle/model-int8.safetensors"
        assert capsys.readouterr().out == f"{path}\n"
        path.unlink()
