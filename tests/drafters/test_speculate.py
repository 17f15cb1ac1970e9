"""drafters/speculate.py: the text with either rule, what is drafted, and the staged chain."""
import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from scipy import stats

from draft import Vanilla
from drafters.lookup import Retrieval
from drafters.speculate import Speculate, load_draft_model
from engine import Engine
from formats.weights import FORMAT
from model import Llama
from sampling import Sampling, gumbel_noise, process

SAMPLINGS = [Sampling(), Sampling(0.7, top_p=0.9, seed=1), Sampling(1.0, seed=-5), Sampling(1.3, top_k=7, seed=2)]


def models(seed: int, apart: float = 0.05) -> tuple[Llama, Llama]:
    """A target and a draft model that is often right."""
    model, draft = tiny.pair(seed, 0.15)[0], tiny.pair(seed, 0.15)[0]
    for weight in draft.layers.parameters():
        weight.data += apart * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight) * (
            weight.abs().mean())
    return model, draft


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_text_is_vanillas(seed: int) -> None:
    """Fails if a drafted token is fed at another position, noise is of another position, or a blocked node is accepted:
    plain and staged, with a stop id, and to the end of the context. Drafts must be accepted, or nothing is tested."""
    model, draft = models(seed)
    ids = tiny.prompt(seed, 2 + 5 * seed)
    gained = []
    drafters = [Speculate(draft, model, length) for length in (1, 5, 16)] + [
        Speculate(draft, model, 8, False, Retrieval(chain), forwards) for chain, forwards in ((1, 4), (3, 4), (4, 9))]
    for how in SAMPLINGS:
        wanted = sum(Engine(model, Vanilla(), 90, frozenset([3])).generate(ids, 80, how), [])
        for drafter in drafters:
            cycles = list(Engine(model, drafter, 90, frozenset([3])).generate(ids, 80, how))
            assert sum(cycles, []) == wanted
            gained += map(len, cycles[1:-1])
    assert sum(gained) > 1.5 * len(gained)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 9])
def test_a_draft_model_that_knows_gains_everything(length: int) -> None:
    """Fails if the last token of a chain that was accepted as a whole is not fed: it is missing in the draft model's
    cache then, and the next cycle drafts nonsense."""
    model, same = tiny.pair(2, 0.3)[0], tiny.pair(2, 0.3)[0]
    for how in (Sampling(), Sampling(1.0, seed=2)):
        for rejection in (False, True):
            drafter = Speculate(same, model, length, rejection)
            cycles = list(Engine(model, drafter, 200).generate(tiny.prompt(0, 7), 1 + 6 * (length + 1), how))
            assert [len(cycle) for cycle in cycles] == [1] + [length + 1] * 6


def test_spare_slots_are_not_context() -> None:
    """Fails if the spare slots of the draft model's cache count as text. A sliding window as long as the context would
    be refused, and LongRoPE would take its frequencies for long texts, with which the drafts are bad."""
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "factor": 4.0,
                "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    for changes in ({"model_type": "mistral", "sliding_window": 64}, {"rope_scaling": longrope}):
        model, same = (tiny.target(3, **changes) for _ in range(2))
        cycles = list(Engine(model, Speculate(same, model, 4), 64).generate(tiny.prompt(0, 7), 1 + 6 * 5))
        assert [len(cycle) for cycle in cycles] == [1] + [5] * 6, changes


@pytest.mark.slow
@pytest.mark.parametrize("how", SAMPLINGS)
def test_chain_is_what_the_draft_model_writes(how: Sampling) -> None:
    """Fails if a draft is not what the draft model itself would write, plain or staged, or if a staged chain is shorter
    than one token a forward."""
    model, draft = models(4)
    ids = tiny.prompt(3, 30)
    most_retrieved = 0
    for retrieval, forwards, length in ((None, 5, 5), (Retrieval(3), 4, 12), (Retrieval(1), 3, 6)):
        drafter = Speculate(draft, model, length, False, retrieval, forwards)
        engine = Engine(model, drafter, 128)
        state = engine.prefill(ids, 60, how)
        while not state.done:
            n = int(state.length)
            text = state.tokens[:n].tolist()
            wanted = plain_chain(draft, text, length, how)
            engine.draw_noise()
            tree = drafter.propose(state)
            drafted = [t for t in tree.tokens[1:].tolist() if t >= 0]
            assert drafted == wanted[:len(drafted)] and len(drafted) >= min(forwards, length)
            assert tree.tokens[0] == text[-1] and all(t < 0 for t in tree.tokens[1 + len(drafted):])
            if retrieval:
                most_retrieved = max(most_retrieved, len(drafted) - forwards)
            engine.cycle()
    assert most_retrieved > 1, "retrieval has never helped"


def plain_chain(draft: Llama, text: list[int], length: int, how: Sampling) -> list[int]:
    """The chain by forwards without a cache, with the noise of each position."""
    text, n = list(text), len(text)
    for position in range(n, n + length):
        logits = tiny.logits(draft, text)[-1:]
        if how.temperature:
            noise = gumbel_noise(torch.tensor(how.seed), torch.tensor([position]), logits.shape[1])
            logits = process(logits, how.temperature, how.top_k, how.top_p, how.min_p) + noise
        text.append(int(logits.argmax()))
    return text[n:]


@pytest.mark.slow
@pytest.mark.parametrize("how, staged", [(Sampling(1.0), False), (Sampling(1.5, top_k=5), True),
                                         (Sampling(0.8, top_p=0.9), False)])
def test_rejection_keeps_the_distribution(how: Sampling, staged: bool) -> None:
    """Fails if q is taken for p, q is not subtracted after a rejection, or a blocked node counts as rejected.
    Chi-square of three tokens in a row against the target's exact distribution, over 600 seeds."""
    count = 600
    model, draft = (tiny.target(seed, vocab_size=6, num_hidden_layers=1) for seed in (0, 1))
    ids = tiny.prompt(5, 6, 6)
    drafter = Speculate(draft, model, 2, True, Retrieval(1), 1) if staged else Speculate(draft, model, 2, True)
    engine, counts = Engine(model, drafter, 32), {}
    for seed in range(count):
        state = engine.prefill(ids, 3, Sampling(how.temperature, how.top_k, how.top_p, how.min_p, seed))
        while not state.done:
            engine.cycle()
        text = tuple(state.tokens[len(ids):len(ids) + 3].tolist())
        counts[text] = counts.get(text, 0) + 1
    seen, expected = [], []
    for text, p in texts(model, ids, 3, how):
        seen.append(counts.pop(text, 0))
        expected.append(count * p)
    assert not counts, f"texts that the target never writes: {counts}"
    order = sorted(range(len(expected)), key=lambda i: -expected[i])
    groups, total = [[0.0, 0.0]], 0.0  # joined until each group expects ten texts
    for i in order:
        if groups[-1][1] >= 10:
            groups.append([0.0, 0.0])
        groups[-1][0] += seen[i]
        groups[-1][1] += expected[i]
        total += expected[i]
    assert total == pytest.approx(count, rel=1e-3)
    if groups[-1][1] < 10:
        last = groups.pop()
        groups[-1] = [a + b for a, b in zip(groups[-1], last)]
    statistic = sum((a - b)**2 / b for a, b in groups)
    assert stats.chi2.sf(statistic, len(groups) - 1) > 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_three_streams_of_noise() -> None:
    """Fails if two of drafting, accepting and resampling use the same noise: chi-square of the choices after 32,000
    nodes that all have the same p and q."""
    model, p, q = tiny.target(0, vocab_size=6), *torch.tensor([[[2.0, 1, 0, 0, 1, -1]], [[0.0, 1, 2, 1, 0, 0]]])
    drafter, counts = Speculate(tiny.target(0, vocab_size=6), model, 16, True), torch.zeros(6)
    engine = Engine(model, drafter, 64)
    state = engine.state
    state.sampling = Sampling(1.0)
    for length in range(100, 100 + 2000 * 17, 17):
        state.length.fill_(length)
        engine.draw_noise()
        drafted = drafter.choose_drafts(state, q.expand(16, -1), 0)
        tree = drafter.tree._replace(tokens=torch.cat((drafted[:1], drafted)))
        counts += drafter.choose(state, tree, p.expand(17, -1))[:16].bincount(minlength=6)
    assert stats.chisquare(counts.numpy(), 32000 * p.softmax(-1)[0].numpy()).pvalue > 1e-4


def texts(model: Llama, ids: list[int], length: int, how: Sampling, odds: float = 1.0) -> list[tuple[tuple, float]]:
    """Every continuation of `length` tokens and its probability."""
    if not length:
        return [((), odds)]
    p = process(tiny.logits(model, ids)[-1:], how.temperature, how.top_k, how.top_p, how.min_p).softmax(-1)[0].tolist()
    return [((token, *rest), q) for token, each in enumerate(p) if each
            for rest, q in texts(model, [*ids, token], length - 1, how, odds * each)]


@pytest.mark.slow
def test_more_is_accepted_by_rejection() -> None:
    """Fails if the rejection rule does not accept more than keyed noise does, although the draft model is often wrong.
    Its share is sum(min(p, q))."""
    model, draft = models(1, 0.5)
    cycles = [sum(len(list(Engine(model, Speculate(draft, model, 3, rejection), 400).generate([1, 2], 300, Sampling(
        1.0, seed=seed)))) for seed in range(4)) for rejection in (True, False)]
    assert cycles[0] < 0.97 * cycles[1]


def test_load(tmp_path: Path) -> None:
    """Fails if the layers of a file without embedding are mixed up, or another target's file is accepted."""
    model = tiny.target(0, torch.float32)
    draft = tiny.target(1, torch.float32, num_hidden_layers=1)
    rest = {k: v for k, v in draft.state_dict().items() if not k.startswith(("embed.", "lm_head."))}
    save_file(rest, tmp_path / "model.safetensors", {"format": FORMAT, "embedding": "target"})
    (tmp_path / "config.json").write_text(json.dumps(tiny.SHAPE | {"num_hidden_layers": 1}))
    loaded = load_draft_model(tmp_path, model)
    draft.embed, draft.lm_head = model.embed, model.lm_head
    assert torch.equal(tiny.logits(loaded, [1, 2, 3]), tiny.logits(draft, [1, 2, 3]))
    for other, message in (({"vocab_size": 25}, "same tokenizer"), ({"hidden_size": 64}, "hidden size")):
        with pytest.raises(ValueError, match=message):
            load_draft_model(tmp_path, tiny.target(0, **other))
    with pytest.raises(FileNotFoundError, match="nowhere: no draft model"):
        load_draft_model(tmp_path / "nowhere", model)
    for size in (0, 17):
        with pytest.raises(ValueError, match="1 to 16"):
            Speculate(draft, model, size)
