"""Searching for tilings (benchmarks/tilings.py), without a GPU: where the search goes, and what it would replace."""
import math
from pathlib import Path

import pytest
import tiny
import torch
from helpers import SHAPE, tiny_checkpoint
from torch import Tensor

from benchmarks import tilings
from benchmarks.tilings import neighbours, products_of, search
from benchmarks.widen import SHAPES
from draft import Vanilla
from engine import Engine
from ops import linear
from ops.tiling import Tiling
from quant.linear import is_quantized, quantize_linears

FIRST = Tiling(1, 8, 512, 1, 2, 1, 1, 2)


def test_neighbours():
    """Fails if the search cannot change a number, if it leaves the range of one, or if it comes back to itself."""
    for first in (FIRST, Tiling(16, 16, 32, 64, 8, 12, 16, 8), Tiling(64, 64, 128, 4, 4, 4)):
        found = neighbours(first)
        assert first not in found and all(t.BM == first.BM for t in found)
        for t in found:
            assert t.BN >= (1 if t.BM == 1 else 16) and t.BK >= 32 and 1 <= t.SK <= 64 and t.warps in (1, 2, 4, 8)
            assert 1 <= t.stages <= 12 and 0 <= t.ahead <= 16 and 1 <= t.unroll <= 8
        assert all(t.ahead == 0 or t.ahead.bit_count() == 1 for t in found), "the prefetch takes powers of two"
        assert any(t.ahead != first.ahead for t in found)
        changed = {name for t in found for name in t._fields if getattr(t, name) != getattr(first, name)}
        assert changed == {"BN", "BK", "SK", "warps", "stages", "ahead", "unroll"}


def test_search():
    """Fails if the search does not reach the fastest tiling, times one twice, counts one that cannot run, or goes on
    for less than noise."""
    timed = []

    def measure(candidates: list[Tiling]) -> dict[Tiling, float]:
        timed.extend(candidates)
        return {t: 1 + abs(math.log2(t.BN / 32)) + abs(t.unroll - 3) + abs(t.warps - 2) + abs(math.log2(t.BK / 512))
                for t in candidates if t.stages == 1}

    tried = search(FIRST, measure)
    ms, best = tried[0]
    assert ms == 1 and (best.BN, best.BK, best.warps, best.unroll) == (32, 512, 2, 3)
    assert len(timed) == len(set(timed)) and {t for _, t in tried} == {t for t in timed if t.stages == 1}
    assert search(FIRST, lambda candidates: {t: 1 - 1e-4 * t.ahead for t in candidates})[0][1].ahead == 2
    with pytest.raises(ValueError, match="BN 8"):
        search(FIRST, lambda candidates: {})


def test_choice():
    """Fails if a product gets another one's tiling, or if a choice outlives its block."""
    today = linear.linear_config(1, 96, 64, 82, (8, 6))
    seen = {}
    with tilings.tilings({(64, 64): FIRST}, seen):
        assert linear.linear_config(1, 64, 64, 82, (8, 6)) == FIRST
        assert linear.linear_config(1, 96, 64, 82, (8, 6)) == today
        assert linear.integer_config(1, 64, 64, 2, 0, 82, (8, 6)) == FIRST
    assert seen == {(64, 64): FIRST, (96, 64): today} and linear.linear_config(1, 64, 64, 82, (8, 6)) != FIRST


def test_products():
    """Fails if a product is missing, or its name or number is wrong. int4 has two columns a byte."""
    model = tiny.target()
    cfg = model.cfg
    names = {name for found in products_of(model).values() for name in found}
    assert names == {"wqkv", "wo", "w13", "w2", "lm_head"}
    assert products_of(model)[2 * cfg.intermediate_size, cfg.hidden_size].count("w13") == cfg.num_layers
    with torch.no_grad():
        quantize_linears(model, "int4")
    assert products_of(model)[2 * cfg.intermediate_size, 128].count("w13") == cfg.num_layers


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_shape(quantize: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --shape needs an option that this command does not have, or if it searches the small model."""
    monkeypatch.setitem(SHAPES, "llama-2-7b", SHAPE | {"vocab_size": 200})  # fewer ids than the checkpoint's
    args = tilings.parse_args(["--checkpoint", str(tiny_checkpoint(tmp_path)), "--shape", "llama-2-7b",
                               *(["--quantize", quantize] if quantize else [])])
    args.device = "cpu"
    model = tilings.load_subject(args).model
    assert model.cfg.hidden_size == SHAPE["hidden_size"] and is_quantized(model) == bool(quantize)


def test_search_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a product is not searched, if what was found for one is not kept for those after it, if a tiling that
    cannot run, or that gives other features or logits, is counted, or if the table names another tiling than the
    fastest. PyTorch stands for the kernel here, and asks for a tiling as the kernel does."""
    asked, times = {}, {}

    def linear_torch(x: Tensor, weight: Tensor, *args, **kwargs) -> Tensor:
        tiling = linear.linear_config(x.numel() // x.shape[-1], *weight.shape, 82, (8, 6))
        asked[tuple(weight.shape)] = tiling
        if tiling.warps == 1:
            raise RuntimeError("out of resources")
        return original(x, weight, *args, **kwargs) + 1000 * (tiling.ahead == 7)

    def timed(function, device, unroll: int, rounds: int, calls: int) -> float:
        function()
        return 1 + sum(abs(t.stages - 3) for t in asked.values() if t.ahead != 7)

    original = linear.linear_torch
    first = Tiling(16, 64, 64, 1, 4, 5)
    monkeypatch.setattr(linear, "linear_torch", linear_torch)
    monkeypatch.setattr(linear, "linear_config", lambda *_: first)
    monkeypatch.setattr(tilings, "compile_kernels", lambda *jobs: [job() for job in jobs])
    monkeypatch.setattr(tilings, "timed", timed)
    monkeypatch.setattr(tilings, "neighbours", lambda t: [
        t._replace(stages=t.stages - 1), t._replace(warps=1), t._replace(ahead=7)])
    engine = Engine(tiny.target(), Vanilla(), 300)
    monkeypatch.setattr(engine, "compile", lambda rows: times.update(rows=rows))
    tilings.search_all(engine, 10, 100)
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if line.startswith("|")][2:]
    assert times == {"rows": (10,)} and len(products_of(engine.model)) * 3 == len(rows), shown
    assert all("stages 3" in row for row in rows[::3]) and "warps 1" not in shown and "ahead 7" not in shown
    assert all(tiling.stages == 3 for product, tiling in asked.items()), "the last verification has all that was found"
