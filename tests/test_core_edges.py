"""What only shows at an edge: a large epsilon, a long chunk at the end of a cache, a graph for each seed, defaults.

    python -m pytest tests/test_core_edges.py
"""
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import FLAGS, SAMPLINGS, arguments, as_on_a_gpu, vanilla, write
from torch import Tensor

import engine as engine_module
import generate
from draft import Vanilla
from drafters.medusa import MedusaHeads, save_medusa
from drafters.methods import METHODS, make_drafter
from engine import Engine
from formats.config import Config
from model import Llama
from sampling import Sampling
from training.dialogues import sample


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def by_hand(model: Llama, ids: list[int]) -> Tensor:
    """The features of a Llama-like model from the formulas alone, [T, C], with no function of model.py or ops/."""
    cfg = model.cfg
    eps, size, groups = cfg.rms_norm_eps, cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
    x = model.embed.weight[ids]
    angle = torch.outer(torch.arange(len(ids)), cfg.rope_theta ** (-torch.arange(0, size, 2) / size)).double()
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [T, 1, D / 2]
    for layer in model.layers:
        y = norm(x, layer.attn_norm.weight, eps) @ layer.wqkv.weight.T
        y = (y if layer.wqkv.bias is None else y + layer.wqkv.bias).view(len(ids), -1, size)
        q, k, v = y.split((cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads), 1)
        if cfg.qk_norm:
            q, k = norm(q, layer.q_norm.weight, eps), norm(k, layer.k_norm.weight, eps)
        q, k = (torch.complex(*z.chunk(2, -1)) * turn for z in (q, k))
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", q, k.conj()).real / size**0.5
        seen = torch.ones(len(ids), len(ids)).tril() == 1
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", weights, v).flatten(1) @ layer.wo.weight.T
        gate, up = (norm(x, layer.mlp_norm.weight, eps) @ layer.w13.weight.T).chunk(2, -1)
        x = x + (gate / (1 + (-gate).exp()) * up) @ layer.w2.weight.T
    return norm(x, model.norm.weight, eps)


@pytest.mark.parametrize("shape, bias", [({}, False), ({"head_dim": 10}, True), ({"model_type": "qwen3"}, False)])
def test_formulas(shape: dict, bias: bool) -> None:
    """Fails if any norm of the model has an epsilon of its own: here it is 4, which shows in each, the last one too."""
    model = Llama(Config.from_dict(tiny.SHAPE | shape | {"rms_norm_eps": 4.0, "rope_theta": 100.0}), qkv_bias=bias)
    tiny.randomise(model, 3, torch.float64)
    ids = tiny.prompt(2, 12)
    model.allocate_cache(16)
    expected = by_hand(model, ids)
    assert torch.allclose(tiny.features(model, ids), expected, atol=1e-6)
    slots = torch.arange(12)
    mask = torch.ones(12, 16, dtype=torch.bool).tril()
    assert torch.allclose(model(torch.tensor([ids]), slots, slots, mask)[0], expected, atol=1e-6)


def test_a_long_chunk_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if, as prompts are read on a GPU, a long chunk that would reach past the cache is not moved to its end, or
    if tokens that it then reads again are read wrongly."""
    for name, value in (("PREFILL_CHUNK", 64), ("SHORT_CHUNK", 8), ("SPARE", 9)):
        monkeypatch.setattr(engine_module, name, value)
    model = tiny.target(3)
    for length in (80, 81, 99):
        ids = tiny.prompt(length, length)
        engine = as_on_a_gpu(Engine(model, Vanilla(), 100))
        text = write(engine, ids, 100 - length)
        assert int(engine.first_slot) == {80: 72, 81: 45, 99: 45}[length]  # 80: two short chunks do
        assert text == vanilla(model, ids, 100 - length)


def test_a_graph_for_each_way_to_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if each seed captures a graph of its own, which takes seconds on a GPU, or if two ways to sample share one.
    """
    engine, keys = Engine(tiny.target(3), Vanilla(), 64), []
    monkeypatch.setattr(engine, "captured", lambda function, *key: keys.append(key) or function)
    for how in (Sampling(1.0, seed=1), Sampling(1.0, seed=2), Sampling(1.0, 5, seed=2), Sampling()):
        write(engine, [1, 2, 3], 2, how)
    assert len(keys) == 4 and keys[0] == keys[1] and len(set(keys)) == 3


def test_warm_up_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if compile_s, which --json prints, is not how long warming up took, or if a CPU, which compiles nothing,
    takes time for it."""
    engine = Engine(tiny.target(3), Vanilla(), 64)
    times = iter([10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr("engine.time", SimpleNamespace(perf_counter=lambda: next(times)))
    monkeypatch.setattr(engine, "generate", lambda *_: pytest.fail("a CPU is warmed up"))
    assert engine.compile_s == 0
    engine.warm_up(SAMPLINGS[1])
    assert engine.compile_s == 0.5
    ran = []
    monkeypatch.setattr(engine, "generate", lambda ids, count, how: ran.append((len(ids), count, how)) or [])
    monkeypatch.setattr(engine, "compile", lambda *how: ran.append(how))
    as_on_a_gpu(engine).warm_up(SAMPLINGS[1])
    assert ran == [(SAMPLINGS[1],), (8, 8, SAMPLINGS[1])] and engine.compile_s == 4


def test_default_sizes(tmp_path: Path) -> None:
    """Fails if a method drafts another number of nodes, or deeper, than its documentation says, where nothing else is
    asked for."""
    model, head = tiny.pair(0, dtype=torch.float32)
    folder = tiny.save_target(model, tmp_path / "target")
    tiny.save_head(head, folder / "eagle")
    tiny.save_head3(tiny.head3(model), folder / "eagle3")
    tiny.save_block(tiny.block(model), folder / "block")
    save_medusa(MedusaHeads(model.cfg.hidden_size, 4), folder / "medusa")
    words = {".": folder, "medusa": folder / "medusa"}
    found = {}
    for method, flags in FLAGS.items():
        args = generate.parse_args(arguments(folder, *(str(words.get(flag, flag)) for flag in flags)))
        drafter = make_drafter(method, args, model, 64)
        found[method] = drafter.num_nodes, drafter.max_depth
    assert found == {"vanilla": (1, 0), "lookup": (11, 10), "lookahead": (56, 4), "medusa": (64, 4),
                     "speculate": (6, 5), "speculate+rejection": (6, 5), "speculate+lookup": (9, 8), "eagle": (26, 5),
                     "eagle2": (8, 4), "eagle2+lookup": (8, 10), "eagle3": (8, 4), "eagle3+lookup": (8, 10),
                     "block": (8, 6), "block+lookup": (8, 10)}
    assert found.keys() == METHODS.keys()


def test_unlikely_words_of_users() -> None:
    """Fails if user turns, which train a head, are cut at another min-p than 0.02 of the likeliest token."""
    p = torch.tensor([1.0, 0.03, 0.015])
    torch.manual_seed(0)
    rows = 20000
    drawn = sample(p.log().repeat(rows, 1), torch.ones(rows), torch.zeros(rows, dtype=torch.bool)).bincount(minlength=3)
    assert drawn[1] > 300 and drawn[2] == 0
