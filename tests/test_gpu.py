"""What only a GPU can show. `make test` skips this file where there is none.

The kernels against float64 on the device, the engine against vanilla, and what a captured cycle promises: the host
never waits within the loop, nothing is allocated, and nothing is compiled for a longer prompt.
"""
import copy
import gc
import itertools
import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from soak import soak
from torch import Tensor

import generate
import sampling
import tree
from app import memory, trace
from app.options import Engine
from draft import Eagle2, Vanilla, load_head
from drafters import lookup, tree_size
from drafters.eagle1 import Eagle1
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup, Retrieval
from drafters.medusa import Medusa, MedusaHeads
from drafters.methods import METHODS
from drafters.speculate import Speculate
from engine import first_difference
from model import load_model
from ops import attention, embed_rope, linear, quantized
from ops import tree as tree_kernels
from ops.graphs import capture
from ops.quantized import Quantized, dequantize, pack, quantize_rows, rotate
from quant.linear import MODES
from sampling import Sampling
from tree import State

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SLOTS = 1024 + 128
HALF = [torch.bfloat16, torch.float16]
HEADS = Path(__file__).parents[1] / "heads" / "SmolLM2-135M-Instruct"


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("H, K, D", [(32, 32, 128), (32, 8, 128), (9, 3, 64), (28, 4, 128)])
@pytest.mark.parametrize("T", [1, 7, 10, 16, 32, 60, 64])
def test_attention(T: int, H: int, K: int, D: int) -> None:
    """A wrong tile, layout or split on real tensor cores: no prefix, one that ends at a block's edge, a full cache."""
    torch.manual_seed(T)
    parents = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, T)])
    bits = tree.build_tree(parents, parents, T).ancestors[:, None].cuda()
    for base in (0, 1, 63, 64, 65, 500, SLOTS - T):
        for seen, dtype in ((bits, torch.bfloat16), (None, torch.float16), (bits, torch.float32)):
            q, kv = randn(T, H, D, dtype=dtype), randn(2, K, SLOTS, D, dtype=dtype)
            base_ = torch.tensor(base, device="cuda")
            exact = attention.tree_attention_torch(q.double(), kv.double(), base_, seen)
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            assert error(attention.tree_attention(q, kv, base_, seen), exact) < limit, (base, dtype)


def test_attention_of_a_prefill() -> None:
    for base in (0, 100, SLOTS - 512):
        q, kv, base_ = randn(512, 9, 64), randn(2, 3, SLOTS, 64), torch.tensor(base, device="cuda")
        exact = attention.tree_attention_torch(q.double(), kv.double(), base_, None)
        assert error(attention.tree_attention(q, kv, base_), exact) < 1e-2


@pytest.mark.parametrize("N, K", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (960, 576),
                                  (576, 576), (3072, 576), (576, 1536), (49152, 576), (576, 1152)])
@pytest.mark.parametrize("M", [1, 2, 7, 10, 16, 24, 32, 48, 60, 64])
def test_linear(M: int, N: int, K: int) -> None:
    """A pipeline that overwrites what the tensor cores still read, a split that arrives twice: five times the same
    bits, and those of float64."""
    torch.manual_seed(M)
    x, weight, norm, residual = randn(M, K), randn(N, K) * K**-0.5, (randn(K) * 0.1 + 1, 1e-5), randn(M, N)
    for args in ((x, weight), (x, weight, None, norm), (x, weight, None, None, residual),
                 (x, weight, None, norm, None, True)):
        outs = [linear.linear(*args) for _ in range(5)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        doubles = [tuple(a.double() if isinstance(a, Tensor) else a for a in arg) if isinstance(arg, tuple) else
                   arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        assert error(outs[0], linear.linear_torch(*doubles)) < 1e-2


@pytest.mark.parametrize("group, planes, rotated", [(0, 2, False), (0, 1, True), (128, 2, False), (64, 2, False)])
@pytest.mark.parametrize("N, K", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (5120, 13824),
                                  (6144, 4096), (4096, 14336), (32000, 4096), (960, 576), (576, 1536), (1000, 832)])
def test_integer_linear(N: int, K: int, group: int, planes: int, rotated: bool) -> None:
    """int8, int8dyn and int4 against float64 of the dequantised weights, times activations as the format has them: the
    layouts of operands in registers, groups, planes; five times the same bits."""
    torch.manual_seed(N + K)
    if group:
        data = pack(torch.randint(-8, 8, (N, K), device="cuda"))
        weight = Quantized(data, randn(data.shape[1] * 2 // group, N, 2) * 1e-3, group, planes)
    else:
        data = torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)
        weight = Quantized(data, torch.rand(N, device="cuda") * 1e-3, 0, planes, rotated)
    full = dequantize(weight, torch.float32)[:, :K].double()
    assert full.equal(quantized.dequantize_torch(weight, torch.float32)[:, :K].double())
    for M in (1, 2, 7, 10, 16, 24, 32, 48, 60, 64):
        x, norm = randn(M, K), (randn(K) * 0.1 + 1, 1e-5)
        q, scale = quantize_rows(x, planes, rotated)
        outs = [linear.linear(x, weight, dtype=torch.float32) for _ in range(5)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert error(outs[0], (q.double() * scale) @ full.T) < 2e-3 / 30**(planes - 1), M  # a step of 8 bits may differ
        gated = linear.linear(x, weight, None, norm, gated=True)
        gate, up = (torch.nn.functional.rms_norm(x.double(), (K,), norm[0].double(), norm[1]) @ (
            full if not rotated else rotate(full).double()).T).chunk(2, 1)
        assert error(gated, torch.nn.functional.silu(gate) * up) < (4e-2 if planes == 1 else 1e-2), M


@pytest.mark.parametrize("H, K, D, C", [(32, 32, 128, 4096), (32, 8, 128, 4096), (9, 3, 64, 576)])
@pytest.mark.parametrize("M", [1, 7, 10, 60])
def test_heads(M: int, H: int, K: int, D: int, C: int) -> None:
    """The projection that rotates and stores: against its steps in float64."""
    x, weight, norm = randn(M, C), randn((H + 2 * K) * D, C) * C**-0.5, (randn(C) * 0.1 + 1, 1e-5)
    angles, slots = torch.rand(M, D // 2, device="cuda").repeat(1, 2) * 6, torch.randperm(100, device="cuda")[:M]
    rope, kv = torch.stack((angles.cos(), angles.sin())).bfloat16(), randn(2, K, 100, D)
    exact = kv.double()
    projected = linear.linear_torch(x.double(), weight.double(), None, (norm[0].double(), norm[1]))
    q = embed_rope.rope_store_torch(projected, rope.double(), slots, exact)
    assert error(linear.linear(x, weight, None, norm, heads=(rope, slots, kv)), q.flatten(1)) < 1e-2
    assert error(kv, exact) < 1e-2


@pytest.mark.parametrize("vocab, k, depth", [(32000, 10, 6), (49152, 3, 3), (128256, 10, 8), (128256, 1, 1)])
def test_tree_steps(vocab: int, k: int, depth: int) -> None:
    """The steps of a cycle give what tree.py's give on the same logits."""
    results = []
    for steps, device in ((tree, "cpu"), (tree_kernels, "cuda")):
        random = torch.Generator().manual_seed(3)
        level, candidates = tree.start_tree(k, depth, torch.device(device))
        for j in range(depth):
            logits = 3 * torch.randn(k if j else 1, vocab, generator=random)
            level = steps.grow(logits.to(device), level, candidates, j, k)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        state = State(torch.arange(80, device=device), zero + 20, torch.zeros(1), zero + 3, zero > 0, 0)
        begun = steps.catch_up(state, depth + 1, torch.arange(2 * (depth - 1) * k, device=device).view(2, -1))
        noise, ids = torch.randn(vocab, generator=random).to(device), torch.arange(2, vocab, 3, device=device)
        best = steps.best_tokens(logits.to(device)[:, :len(ids)], k, ids, noise)
        made = steps.rerank(state, candidates, min(59, len(candidates.tokens)), depth)
        chosen = steps.argmax(torch.randn(len(made.tokens), vocab, generator=random).to(device))
        chosen[:1] = made.tokens[1]
        report = torch.zeros(depth + 3, dtype=torch.int64, device=device)
        path = steps.accept_commit(made, chosen, state, chosen[:0], zero + 60, depth, report)
        results.append([t.cpu() for t in (*candidates, *made, *begun, best, chosen, path, state.length, state.done,
                                          report[:4])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("T, C, D", [(1, 576, 64), (10, 4096, 128), (64, 5120, 128), (512, 8192, 128)])
def test_beginning_and_end(T: int, C: int, D: int) -> None:
    """What a forward starts with, a draft head's too, and its last norm."""
    table, rope, onward = randn(300, C), randn(2, 90, D), randn(70, C + 32, dtype=torch.float32)[:, 32:]
    tokens, places, rows = (torch.randint(n, (T,), device="cuda") for n in (300, 90, 70))
    for args in ((), (onward, rows), *([(onward[:T],)] if T <= 70 else [])):
        for ours, theirs in zip(embed_rope.embed(table, tokens, rope, places, *args),
                                embed_rope.embed_torch(table, tokens, rope, places, *args), strict=True):
            assert torch.equal(ours, theirs)
    x, weight = randn(2, T, C), randn(C)
    exact = torch.nn.functional.rms_norm(x.double(), (C,), weight.double(), 1e-5)
    assert error(linear.rms_norm(x, weight, 1e-5), exact) < 1e-2


@pytest.mark.parametrize("rule", lookup.RULES)
def test_retrieval(rule: str) -> None:
    """The kernel's chains and scores are the twin's, in short texts and in long ones."""
    torch.manual_seed(0)
    for n in (1, 2, 5, 100, 1023, 1024, 1025, 3000):
        text, made = torch.randint(3, (3100,)), []
        for device in ("cpu", "cuda"):
            state = State(text.to(device), torch.tensor(n, device=device), torch.zeros(1), torch.tensor(1), None, 3072)
            made.append((torch.zeros(11, dtype=torch.int64, device=device), torch.zeros(10, device=device)))
            Retrieval(10, rule, device).write(state, *made[-1])
        assert made[0][0].equal(made[1][0].cpu()), n
        torch.testing.assert_close(made[0][1], made[1][1].cpu())


def test_rejection(engines: list[Engine], demo_prompts: list[list[int]]) -> None:
    """The papers' rule in a graph: a draft model that is the target's first two layers, and another text than vanilla's
    but a steady one; with the target itself as draft model, all is accepted."""
    model, two = engines[0].model, engines[-1].drafter.draft
    engine = Engine(model, Speculate(two, model, rejection=True), 3200, frozenset([2]))
    texts = [sum(engine.generate(demo_prompts[0], 40, Sampling(1.0, seed=3)), []) for _ in range(2)]
    assert texts[0] == texts[1]
    same = copy.deepcopy(model)
    same.free_cache()
    engine = Engine(model, Speculate(same, model, 4, rejection=True), 3200)
    cycles = list(engine.generate(demo_prompts[1], 41, Sampling(1.0, seed=4)))
    assert sum(len(cycle) == 5 for cycle in cycles) >= 6


def test_noise() -> None:
    """The kernel's noise is that of the twin, whose distribution is tested."""
    seed, places = torch.tensor(-7), torch.arange(5) * 10**6
    ours = sampling.gumbel_noise(seed.cuda(), places.cuda(), 49152).cpu()
    torch.testing.assert_close(ours, sampling.gumbel_noise(seed, places, 49152), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def engines(demo) -> list[Engine]:
    """fp32 without TF32: rounding then decides nothing on these prompts."""
    assert not torch.backends.cuda.matmul.allow_tf32
    model = load_model(demo, "cuda", torch.float32)
    head, draft = load_head(demo / "eagle", model), load_model(demo, "cuda", torch.float32)
    draft.layers = draft.layers[:2]
    heads = MedusaHeads(model.cfg.hidden_size, 4).cuda().requires_grad_(False)
    retrieval = Retrieval(10, device="cuda")
    return [Engine(model, drafter, 3200, frozenset([2])) for drafter in (
        Vanilla("cuda"), Eagle1(head, model), Eagle2(head, model), Eagle2(head, model, 24, 8, 3),
        Eagle2(head, model, retrieval=retrieval), Lookup("cuda"), Lookahead(model), Medusa(heads, model),
        Speculate(draft, model), Speculate(draft, model, 8, retrieval=Retrieval(4, device="cuda")))]


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7, top_p=0.9, seed=1), Sampling(1.0, seed=-2),
                                      Sampling(1.0, top_k=20, min_p=0.02, seed=3)], ids=str)
def test_equals_vanilla(engines: list[Engine], demo_prompts: list[list[int]], how: Sampling) -> None:
    for ids in demo_prompts:
        vanilla, *others = [sum(engine.generate(ids, 64, how), []) for engine in engines]
        assert all(text == vanilla for text in others)


def test_graph_equals_launching(engines: list[Engine], demo_prompts: list[list[int]]) -> None:
    """A graph that holds on to what was only there when it was captured."""
    eagle = engines[2]
    launched = Engine(eagle.model, eagle.drafter, 3200, frozenset([2]), compiled=False)
    for ids in demo_prompts[:2]:
        assert list(eagle.generate(ids, 40)) == list(launched.generate(ids, 40))


def test_second_turn(engines: list[Engine], demo_prompts: list[list[int]]) -> None:
    """A chunk that begins anywhere in the caches; a cycle that ran ahead of a text that was left, or that ran when a
    graph was captured for another sampling, and spoilt what is kept."""
    for engine in engines:
        for how in (Sampling(), Sampling(0.9, seed=4)):
            ids = demo_prompts[2] + sum(itertools.islice(engine.generate(demo_prompts[2], 400), 12), [])
            for more in (demo_prompts[3], [5] * 1500, [7] * (3199 - len(ids))):
                second = sum(engine.generate(ids + more, 20, how, reuse=True), [])
                assert engine.reused >= len(demo_prompts[2])
                assert second == sum(engine.generate(ids + more, 20, how), [])
                list(itertools.islice(engine.generate(ids, 100), 3))


def test_the_loop_never_waits_nor_allocates(engines: list[Engine], demo_prompts: list[list[int]]) -> None:
    """200 cycles in which any synchronisation but that with the report's event is an error."""
    for with_stops in (engines[0], engines[2], *engines[4:]):
        engine = Engine(with_stops.model, with_stops.drafter, 3200)
        for _ in range(2):  # the first round warms up
            cycles = engine.generate(demo_prompts[4], 3000, Sampling(1.0, seed=5))
            next(cycles)
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                ran = sum(1 for _ in itertools.islice(cycles, 200))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            after = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert ran == 200 and after == before


def variants() -> int:
    """How many kernels Triton has compiled or loaded in this process."""
    modules = (attention, embed_rope, linear, lookup, quantized, tree_kernels)
    functions = [f for module in modules for f in vars(module).values() if hasattr(f, "device_caches")]
    return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())


def test_graphs_share_memory() -> None:
    """Memory that is given up with the last graph that used it (the next capture fails), or one pool for each graph."""
    x, reserved = torch.zeros(1 << 24, device="cuda"), []
    for _ in range(3):
        replay = capture(lambda: (x + 1).sum())
        replay()
        del replay
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] == reserved[-1]


def test_no_prompt_compiles_anything(engines: list[Engine]) -> None:
    """Prompts of 1 to 3,000 tokens: three graphs an engine, and no kernel that was not there before."""
    for engine in (engines[2], engines[0], *engines[4:]):  # EAGLE-2 first: there is something to count
        list(engine.generate([1, 2, 3], 10))
        graphs, compiled = len(engine.graphs), variants()
        assert graphs >= 3 and compiled > 10
        for length in (1, 2, 31, 64, 65, 128, 129, 511, 512, 513, 1500, 3000):
            assert len(sum(engine.generate([5] * length, 5), [])) <= 5
        assert len(engine.graphs) == graphs and variants() == compiled


@pytest.mark.parametrize("which", [0, 2, 6])
def test_profile(engines: list[Engine], demo_prompts: list[list[int]], which: int, tmp_path) -> None:
    """Kernels that belong to no phase, for Triton launches them in another way than PyTorch does; graphs that do not
    survive the profiler."""
    engine, ids = engines[which], demo_prompts[0]
    text = list(engine.generate(ids, 30))
    for _ in range(2):
        shown = trace.write_trace(engine, ids, Sampling(), tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = trace.means(events)
    assert found.keys() == {*trace.PHASES, trace.LAUNCHED, trace.REPLAYED} and "GPU busy" in shown
    assert found[trace.LAUNCHED][0] >= trace.CYCLES <= found[trace.REPLAYED][0]
    parts = sum(found[name][2] for name in trace.PHASES[1:])
    assert all(gpu > 0 for name, (_, _, gpu) in found.items() if name != "draft" or which)
    assert 0.7 * parts < found[trace.LAUNCHED][2] < 1.3 * parts
    kernels_of = {name: fmean(len(own) for _, own in each) for name, each in trace.named_ranges(events).items()}
    # Not their times, which depend on who else is on the GPU
    assert 0.9 < kernels_of[trace.REPLAYED] / kernels_of[trace.LAUNCHED] < 1.1
    assert list(engine.generate(ids, 30)) == text


def ties(vanilla: Engine, ids: list[int], text: list[int]) -> list[int]:
    """The places of `text` that plain decoding, given all that comes before them, would have filled otherwise."""
    places, done = [], 0
    while done < len(text):
        own = sum(vanilla.generate(ids + text[:done], len(text) - done), [])
        if own == text[done:]:
            break
        places.append(done + first_difference(own, text[done:]))
        done = places[-1] + 1
    return places


@pytest.mark.parametrize("mode", MODES)
def test_quantized(demo, demo_prompts: list[list[int]], mode: str) -> None:
    """EAGLE-2's text is that of the same quantised model to its last token, but for near-ties, of which 8 bits of an
    activation make more than 16 do (BENCHMARKS.md): int8dyn's whole texts are not counted. Its cycles neither wait nor
    allocate, and no later prompt compiles anything."""
    model = load_model(demo, "cuda", torch.bfloat16, mode)
    head = load_head(demo / "eagle", model, None, mode)
    drafters, same, tied, total = (Vanilla("cuda"), Eagle2(head, model)), 0, 0, 0
    vanilla, eagle = (Engine(model, drafter, 3200, frozenset([2])) for drafter in drafters)
    for ids in demo_prompts:
        text = sum(eagle.generate(ids, 64), [])
        places = ties(vanilla, ids, text)
        same, tied, total = same + (not places), tied + len(places), total + len(text)
        assert not places or vanilla.top2_gap(ids + text[:places[0]]) < 0.5, (mode, places)
    print(f"{mode}: {tied} of {total} tokens are near-ties")
    assert tied <= total // 16 and (same >= len(demo_prompts) // 4 or mode == "int8dyn")
    graphs, compiled = len(eagle.graphs), variants()
    list(eagle.generate([5] * 1500, 5))
    cycles = eagle.generate(demo_prompts[0], 60)
    next(cycles)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert sum(1 for _ in itertools.islice(cycles, 8)) > 2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(eagle.graphs) == graphs and variants() == compiled


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_as_they_are_used(demo, demo_prompts: list[list[int]], method: str) -> None:
    """Each method with the heads that come with this repository, in bfloat16, warmed up again after a long text as
    bench.py does: its text is vanilla's, but for near-ties and other draws."""
    given = {"speculate": {"speculate": HEADS / "draft_model"}, "medusa": {"medusa": HEADS / "medusa"}}
    engine = Engine.load(demo, method, max_seq_len=900, **given.get(method.split("+")[0], {}))
    vanilla = Engine(engine.model, Vanilla("cuda"), 900, frozenset(engine.stop_ids.tolist()))
    for how in (Sampling(), Sampling(1.0, seed=3)):
        for each in (engine, vanilla):
            each.warm_up(how)
            assert len(sum(each.generate([5] * 700, 20, how), [])) <= 20
        for ids in demo_prompts[::3]:
            a, b = (sum(each.generate(ids, 64, how), []) for each in (vanilla, engine))
            assert a == b or engine.drafter.rejection_sampling and how.temperature or (
                vanilla.top2_gap(ids + a[:first_difference(a, b)]) < 0.5), (how, first_difference(a, b))


def test_the_tree_that_fits(demo) -> None:
    """Times that make sense, whatever was measured before; and that measuring leaves the model usable."""
    model = load_model(demo, "cuda", torch.bfloat16)
    head = load_head(demo / "eagle", model)
    first, further, rest, *verify = tree_size.measure(model, head, 1024)
    assert 0 < further < 5 * first and 0 < rest < verify[0] and verify[0] < 1.5 * verify[-1]
    nodes, levels, topk = tree_size.fit(model, head, tree_size.read_curve(demo / "eagle"), 1024)
    assert nodes in tree_size.NODES and 1 <= levels <= tree_size.LEVELS
    engines = [Engine(model, drafter, 1024) for drafter in (Vanilla("cuda"), Eagle2(head, model, nodes, levels, topk))]
    a, b = (sum(engine.generate([5] * 20, 12), []) for engine in engines)
    assert len(a) == len(b) == 12


def test_out_of_memory(demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Too little memory for the weights, the cache, a capture: one line each, then what fits works as ever, and nothing
    stays behind. How much is enough differs: so with more and more, until it is."""
    monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(demo), "--eagle2", "--prompt", "Hi",
                                     "--max_new_tokens", "8", "--max_seq_len", "8192", "--dtype", "bfloat16"])
    total, codes, before = torch.cuda.mem_get_info()[1], [], torch.cuda.memory_allocated()
    try:
        for gb in (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0, 1.5, 2.0, 4.0):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + gb * 1e9) / total))
            try:
                generate.main()
                codes.append(0)
            except SystemExit as ended:
                codes.append(ended.code)
            out, err = capsys.readouterr()
            if codes[-1]:
                assert codes[-1] == 2 and err.splitlines()[-1].startswith("error: out of GPU memory: "), err
                assert "Traceback" not in err
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert codes[0] == 2 and codes[-1] == 0 and codes == sorted(codes, reverse=True)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 100e6


@pytest.mark.parametrize("mode", [None, *MODES])
def test_memory_arithmetic(demo, mode: str | None) -> None:
    """memory.py against the device: what loading takes at its peak and in the end, and with a cache and a cycle."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, dtype = torch.cuda.memory_allocated(), torch.bfloat16
    model = load_model(demo, "cuda", dtype, mode)
    weights = memory.weight_bytes(model.cfg, dtype, mode)
    assert abs(torch.cuda.memory_allocated() - before - weights) < 0.02 * weights  # blocks of 512 bytes
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < weights + max(memory.loading(model.cfg, dtype, mode), 0.02 * weights)
    head = load_head(demo / "eagle", model, 0, mode)
    engine = Engine(model, Eagle2(head, model), 4096)
    list(engine.generate([5] * 700, 20))
    most = weights + memory.cache_bytes(model.cfg, 4096, dtype) + memory.passing(model.cfg, dtype, mode) + (
        memory.eagle_bytes(head.cfg, model.cfg, 4096, dtype, mode))
    assert torch.cuda.memory_allocated() - before < most


def test_soak(demo) -> None:
    """soak.py, which see: not a byte more after 200 prompts than after 40."""
    model = load_model(demo, "cuda", torch.bfloat16)
    head = load_head(demo / "eagle", model)
    early, late, wrong = soak(lambda: Engine(model, Eagle2(head, model), 1024), 200, model.cfg.vocab_size, 20)
    assert early == late and wrong == 0
