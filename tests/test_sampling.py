"""sampling.py at the edges of its numbers. What it draws in between is in tests/test_engine.py and tests/ops.

    python -m pytest tests/test_sampling.py
"""
from math import inf, nan

import pytest
import tiny
import torch
from helpers import vanilla

import sampling
from draft import Eagle2
from engine import Engine
from sampling import Sampling, gumbel_noise, perturb, process

V = 300
LOGITS = 8 * torch.randn(20, V, generator=torch.Generator().manual_seed(0))
SEEDS = (0, 1, -1, 2**32, -2**32, 2**63 - 1, -2**63, 2**63 - 2)


@pytest.mark.parametrize("values, name", [
    *(({"temperature": t}, "temperature") for t in (nan, inf, -inf, -1, -0.5, 1e-38, 9e-7, 1.1e6, 1e38, 1e300)),
    *(({"temperature": 1, "top_p": p}, "top_p") for p in (nan, inf, 0, -0.1, 1.0001)),
    *(({"temperature": 1, "min_p": p}, "min_p") for p in (nan, inf, -1e-9, 1.0001)),
    *(({"temperature": 1, "top_k": k}, "top_k") for k in (-1, 1.5, 2.0, nan, None)),
    *(({"seed": seed}, "seed") for seed in (2**64, -2**63 - 1, 1.5, nan, None))])
def test_refused(values: dict, name: str) -> None:
    """Fails if a number that cannot be honoured is accepted, or if the error does not say which one it is."""
    with pytest.raises(ValueError, match=f"^{name} must be "):
        Sampling(**values)


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_one_token_is_left(temperature: float) -> None:
    """Fails if a limit that only the best token passes excludes it too, or leaves another one, at any temperature."""
    best = LOGITS.argmax(-1)
    limits = [{"top_k": 1}, {"min_p": 1.0}, {"top_k": 1, "top_p": 1e-9, "min_p": 1.0}]
    limits += [{"top_p": p} for p in (1e-3, 1e-7, 1e-12, 1e-45, 1e-300)] if temperature <= 1 else []
    for limit in limits:
        left = process(LOGITS, temperature, **limit)
        assert left.isfinite().sum() == len(LOGITS) and torch.equal(left.argmax(-1), best), limit
        noise = temperature * gumbel_noise(torch.tensor(5), torch.arange(len(LOGITS)), V)
        assert torch.equal(perturb(LOGITS, noise, temperature, **limit).argmax(-1), best), limit


def test_coldest_and_hottest() -> None:
    """Fails if the lowest temperature is not greedy, or the highest one not uniform: if a number overflows, or vanishes
    beside another one."""
    few = LOGITS[:1, :16]

    def draw(temperature: float, rows: int, **limits: float) -> torch.Tensor:
        noise = temperature * gumbel_noise(torch.tensor(3), torch.arange(rows), 16)
        scores = perturb(few.expand(rows, 16), noise, temperature, **limits)
        assert not scores.isnan().any()
        return scores.argmax(-1)
    assert (draw(1e-6, 200) == few.argmax()).all()
    assert (draw(1e-6, 200, top_p=0.9, min_p=0.1, top_k=9) == few.argmax()).all()
    for limits in ({}, {"top_p": 0.99}, {"min_p": 0.5}):
        counts = draw(1e6, 3200, **limits).bincount(minlength=16)
        assert ((counts - 200).abs() < 84).all()  # six standard deviations


def test_where_a_limit_is_met_exactly() -> None:
    """Fails if of tokens that are equally likely others are left than in transformers, or more than top_p asks for; or
    if a top_k beyond the vocabulary is an error."""
    equal = torch.zeros(1, 4)
    assert process(equal, 1.0, top_p=0.75).isfinite().tolist() == [[False, True, True, True]]
    assert process(equal, 1.0, top_k=2).isfinite().all() and process(equal, 1.0, min_p=0.99).isfinite().all()
    assert torch.equal(process(LOGITS, 1.0, top_k=V + 1), LOGITS)


@pytest.mark.parametrize("word", [0, 2**32 - 1])
def test_noise_is_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the first or last of all words that the hash gives makes an infinite noise: it would win over every
    token, or tie with those that are excluded."""
    monkeypatch.setattr(sampling, "mix32", lambda x: torch.full_like(x, word))
    assert gumbel_noise(torch.tensor(1), torch.tensor([5]), 9).isfinite().all()


def test_any_64_bits_are_a_seed() -> None:
    """Fails if a seed is refused, or cut: different seeds give different texts, and unsigned ones those of the same
    bits."""
    model = tiny.target(dtype=torch.float32)
    texts = {seed: tuple(vanilla(model, [1, 2, 3], 12, Sampling(2.0, seed=seed))) for seed in SEEDS}
    assert len(set(texts.values())) == len(SEEDS)
    for seed in (2**63, 2**64 - 1, 2**64 - 2**32):
        assert Sampling(seed=seed).seed == seed - 2**64
        assert tuple(vanilla(model, [1, 2, 3], 12, Sampling(2.0, seed=seed))) == texts[seed - 2**64]


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"min_p": 1.0}])
def test_one_token_is_greedy(limit: dict) -> None:
    """Fails if drafts get the noise of sampling where only the best token is left to the text."""
    model, head = tiny.pair(0, 0.3)
    engine = Engine(model, Eagle2(head, model, 8, 3, 3), 64)
    text = list(engine.generate([1, 2, 3], 12, Sampling(1.0, seed=5, **limit)))
    assert engine.state.noise is None and sum(text, []) == sum(engine.generate([1, 2, 3], 12), [])
