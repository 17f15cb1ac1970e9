"""Searching for tilings (benchmarks/tilings.py), without a GPU: where the search goes, and what it would replace."""
import math

import pytest
import tiny
import torch

from benchmarks import tilings
from benchmarks.tilings import neighbours, products_of, search
from ops import linear
from ops.tiling import Tiling
from quant.linear import quantize_linears

FIRST = Tiling(1, 8, 512, 1, 2, 1, 1, 2)


def test_neighbours():
    """Fails if the search cannot change a number, if it leaves the range of one, or if it comes back to itself."""
    for first in (FIRST, Tiling(16, 16, 32, 64, 8, 12, 16, 8), Tiling(64, 64, 128, 4, 4, 4)):
        found = neighbours(first)
        assert first not in found and all(t.BM == first.BM for t in found)
        for t in found:
            assert t.BN >= (1 if t.BM == 1 else 16) and t.BK >= 32 and 1 <= t.SK <= 64 and t.warps in (1, 2, 4, 8)
            assert 1 <= t.stages <= 12 and 0 <= t.ahead <= 16 and 1 <= t.unroll <= 8
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
    assert search(FIRST, lambda candidates: {t: 1 - 1e-4 * t.ahead for t in candidates})[0][1].ahead == 4
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
