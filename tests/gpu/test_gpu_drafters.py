"""drafters/ on a GPU: the retrieval's kernel, rejection sampling in a graph, methods with real weights, tree sizes.

    python -m pytest tests/gpu/test_gpu_drafters.py -q
"""
import copy

import pytest
import torch

from app.options import Engine
from draft import Eagle2, Vanilla
from drafters import lookup, tree_size
from drafters.heads import Quantize, load_head
from drafters.lookup import Retrieval
from drafters.methods import BASELINE, METHODS
from drafters.speculate import Speculate
from engine import first_difference
from model import load_model
from ops.quantized import dequantize
from quant.linear import drafting_rows, rows_of
from sampling import Sampling
from tree import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("rule", lookup.RULES)
def test_retrieval(rule: str) -> None:
    """Fails if the kernel finds other chains or scores than its twin, in short texts or in long ones."""
    torch.manual_seed(0)
    for n in (1, 2, 5, 100, 1023, 1024, 1025, 3000):
        text = torch.randint(3, (3100,))
        made = []
        for device in ("cpu", "cuda"):
            state = State(text.to(device), torch.tensor(n, device=device), torch.zeros(1), torch.tensor(1), None, 3072)
            made.append((torch.zeros(11, dtype=torch.int64, device=device), torch.zeros(10, device=device)))
            Retrieval(10, rule, device).write(state, *made[-1])
        assert made[0][0].equal(made[1][0].cpu()), n
        torch.testing.assert_close(made[0][1], made[1][1].cpu())


def test_rejection(engines: list[Engine], demo_prompts: list[list[int]]) -> None:
    """Fails if the papers' rule, in a graph and with two layers of the target as draft model, gives another text for
    the same seed, or if it rejects drafts of a draft model that is the target itself."""
    model, two = engines[0].model, engines[-1].drafter.draft
    engine = Engine(model, Speculate(two, model, rejection=True), 3200, frozenset([2]))
    texts = [sum(engine.generate(demo_prompts[0], 40, Sampling(1.0, seed=3)), []) for _ in range(2)]
    assert texts[0] == texts[1]
    same = copy.deepcopy(model)
    same.free_cache()
    engine = Engine(model, Speculate(same, model, 4, rejection=True), 3200)
    cycles = list(engine.generate(demo_prompts[1], 41, Sampling(1.0, seed=4)))
    assert sum(len(cycle) == 5 for cycle in cycles) >= 6


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_rows_of_the_prompt(demo, demo_prompts: list[list[int]], mode: str | None) -> None:
    """Fails if the graphs go on with the rows of the first prompt, or a row is not its token's."""
    model = load_model(demo, "cuda", torch.bfloat16, mode)
    head = load_head(demo / "eagle", model, quantize=Quantize(mode))
    head.vocab = torch.arange(0, 40000, 4, device="cuda")
    drafter = Eagle2(head, model, 16, 4, 4)
    engine, rows = Engine(model, drafter, 900), drafter.bound.draft_rows
    for ids in demo_prompts[:2]:
        list(engine.generate(ids, 20))
        assert {*ids} <= {*rows.ids.tolist()} and len(rows.ids.unique()) == len(rows.ids) == 10512
        expected = drafting_rows(model.lm_head.weight, rows.ids, head.of_embedding is not None)
        for weight in rows.weights:
            found = rows_of(weight, slice(len(rows.ids)))
            assert torch.equal(*(dequantize(w, torch.float32) if mode else w for w in (found, expected)))


@pytest.mark.parametrize("method", [name for name in METHODS if name != BASELINE])
def test_methods_as_they_are_used(demo, demo_prompts: list[list[int]], weights_of: dict, method: str) -> None:
    """Fails if a method, with weights as in a checkpoint, in bfloat16, and warmed up again after a long text as by
    bench.py, writes another text than vanilla, but for near-ties and other draws."""
    given = {{"draft": "head"}.get(option, option): folder for option, folder in weights_of[method].items()}
    engine = Engine.load(demo, method, max_seq_len=900, **given)
    vanilla = Engine(engine.model, Vanilla("cuda"), 900, frozenset(engine.stop_ids.tolist()))
    for how in (Sampling(), Sampling(1.0, seed=3)):
        for each in (engine, vanilla):
            each.warm_up(how)
            assert len(sum(each.generate([5] * 700, 20, how), [])) <= 20
        for ids in demo_prompts[::3]:
            a, b = (sum(each.generate(ids, 64, how), []) for each in (vanilla, engine))
            assert a == b or engine.drafter.rejection_sampling and how.temperature or (
                vanilla.top2_gap(ids + a[:first_difference(a, b)], how) < 0.5), (how, first_difference(a, b))


def test_the_tree_that_fits(demo) -> None:
    """Fails if measured times make no sense, whatever was measured before, or if measuring leaves a model unusable."""
    model = load_model(demo, "cuda", torch.bfloat16)
    head = load_head(demo / "eagle", model)
    first, further, rest, *verify = tree_size.measure(model, head, 1024)
    assert 0 < further < 5 * first and 0 < rest < verify[0] and verify[0] < 1.5 * verify[-1]
    nodes, levels, topk = tree_size.fastest_tree(model, head, tree_size.read_curve(demo / "eagle"), 1024)
    assert nodes in tree_size.NODES and 1 <= levels <= tree_size.LEVELS
    engines = [Engine(model, drafter, 1024) for drafter in (Vanilla("cuda"), Eagle2(head, model, nodes, levels, topk))]
    a, b = (sum(engine.generate([5] * 20, 12), []) for engine in engines)
    assert len(a) == len(b) == 12
