"""ops/ on a GPU: every kernel against float64 or its twin, and CUDA graphs that share memory.

    python -m pytest tests/gpu/test_gpu_ops.py -q
"""
import pytest
import torch
from torch import Tensor

import sampling
import tree
from ops import attention, context, embed_rope, linear, markov, quantized
from ops import tree as tree_kernels
from ops.graphs import capture
from ops.quantized import Quantized, dequantize, pack, quantize_rows, rotate
from tree import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SLOTS = 1024 + 128


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("H, K, D", [(32, 32, 128), (32, 8, 128), (9, 3, 64), (28, 4, 128)])
@pytest.mark.parametrize("T", [1, 7, 10, 16, 32, 60, 64, 65, 128])
def test_attention(T: int, H: int, K: int, D: int) -> None:
    """Fails if a tile, a layout or a split is wrong on real tensor cores: without a prefix, with one that ends at a
    block's edge, in a full cache."""
    torch.manual_seed(T)
    parents = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, T)])
    bits = tree.build_tree(parents, parents, T).ancestors.cuda()
    for base in (0, 1, 63, 64, 65, 500, SLOTS - T):
        for seen, dtype in ((bits, torch.bfloat16), (None, torch.float16), (bits, torch.float32)):
            q, kv = randn(T, H, D, dtype=dtype), randn(2, K, SLOTS, D, dtype=dtype)
            base_ = torch.tensor(base, device="cuda")
            exact = attention.tree_attention_torch(q.double(), kv.double(), base_, seen)
            limit = 1e-5 if dtype == torch.float32 else 1e-2
            assert error(attention.tree_attention(q, kv, base_, seen), exact) < limit, (base, dtype)


def test_attention_of_a_prefill() -> None:
    """Fails if a chunk of 512 rows attends to other slots than a causal mask says."""
    for base in (0, 100, SLOTS - 512):
        q, kv, base_ = randn(512, 9, 64), randn(2, 3, SLOTS, 64), torch.tensor(base, device="cuda")
        exact = attention.tree_attention_torch(q.double(), kv.double(), base_, None)
        assert error(attention.tree_attention(q, kv, base_), exact) < 1e-2


@pytest.mark.parametrize("N, K", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (960, 576),
                                  (576, 576), (3072, 576), (576, 1536), (49152, 576), (576, 1152)])
@pytest.mark.parametrize("M", [1, 2, 7, 10, 16, 24, 32, 48, 60, 64, 65, 100, 128])
def test_linear(M: int, N: int, K: int) -> None:
    """Fails if a pipeline overwrites what the tensor cores still read, or if a split is added twice: five runs must
    give the same bits, and float64's values."""
    torch.manual_seed(M)
    x, weight, norm, residual = randn(M, K), randn(N, K) * K**-0.5, (randn(K) * 0.1 + 1, 1e-5), randn(M, N)
    for args in ((x, weight), (x, weight, None, norm), (x, weight, None, None, residual),
                 (x, weight, None, norm, None, True)):
        outs = [linear.linear(*args) for _ in range(5)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        doubles = [tuple(a.double() if isinstance(a, Tensor) else a for a in arg) if isinstance(arg, tuple) else
                   arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        assert error(outs[0], linear.linear_torch(*doubles)) < 1e-2


@pytest.mark.parametrize("group, planes, rotated, zeros", [
    (0, 2, False, False), (0, 1, True, False), (128, 2, False, False), (64, 2, False, False), (32, 2, False, False),
    (128, 2, False, True), (32, 2, False, True)])
@pytest.mark.parametrize("N, K", [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (5120, 13824),
                                  (6144, 4096), (4096, 14336), (32000, 4096), (960, 576), (576, 1536), (1000, 832),
                                  (2048, 1536), (17920, 1536), (1536, 8960)])
def test_integer_linear(N: int, K: int, group: int, planes: int, rotated: bool, zeros: bool) -> None:
    """Fails if int8, int8dyn or int4 products are not those of the dequantised weights and the quantised activations in
    float64: a wrong layout of operands in registers, a wrong group or plane. Five runs must give the same bits."""
    torch.manual_seed(N + K)
    if group:
        data = pack(torch.randint(-8, 8, (N, K), device="cuda"))
        scale = randn(data.shape[1] * 2 // group, N, 2) * 1e-3
        if zeros:
            scale = torch.stack((scale[..., 0], torch.randint_like(scale[..., 0], -8, 8)), -1).half()
        weight = Quantized(data, scale, group, planes)
    else:
        data = torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)
        weight = Quantized(data, torch.rand(N, device="cuda") * 1e-3, 0, planes, rotated)
    full = dequantize(weight, torch.float32)[:, :K].double()
    assert full.equal(quantized.dequantize_torch(weight, torch.float32)[:, :K].double())
    prompt = randn(200, K)  # so many rows are a prefill's, which takes some rows of a large weight at a time
    q, scale = quantize_rows(prompt, planes, rotated)
    assert error(linear.linear(prompt, weight), (q.double() * scale) @ full.T) < 1e-2
    for M in (1, 2, 7, 10, 16, 24, 32, 48, 60, 64, 65, 100, 128):
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
    """Fails if the projection that also rotates and stores differs from its three steps in float64."""
    x, weight, norm = randn(M, C), randn((H + 2 * K) * D, C) * C**-0.5, (randn(C) * 0.1 + 1, 1e-5)
    angles, slots = torch.rand(M, D // 2, device="cuda").repeat(1, 2) * 6, torch.randperm(100, device="cuda")[:M]
    rope, kv = torch.stack((angles.cos(), angles.sin())).bfloat16(), randn(2, K, 100, D)
    exact = kv.double()
    projected = linear.linear_torch(x.double(), weight.double(), None, (norm[0].double(), norm[1]))
    q = embed_rope.rope_store_torch(projected, rope.double(), slots, exact)
    assert error(linear.linear(x, weight, None, norm, rope_cache=(rope, slots, kv)), q.flatten(1)) < 1e-2
    assert error(kv, exact) < 1e-2


@pytest.mark.parametrize("L, K, D", [(5, 8, 128), (2, 3, 64), (1, 2, 24)])
@pytest.mark.parametrize("T", [1, 8, 500])
def test_store_context(T: int, L: int, K: int, D: int) -> None:
    """Fails if a key is stored with another layer's norm, another angle or in another slot, or if a value changes."""
    rows, k_norms, slots = randn(T, L * 2 * K * D), randn(L, D) * 0.1 + 1, torch.randperm(600, device="cuda")[:T]
    angles = torch.rand(600, D // 2, device="cuda").repeat(1, 2) * 6
    rope, kv = torch.stack((angles.cos(), angles.sin())).bfloat16(), randn(L, 2, K, 600, D)
    exact = kv.double()
    context.store_context_torch(rows.double(), rope.double(), slots, exact, k_norms.double(), 1e-6)
    context.store_context(rows, rope, slots, kv, k_norms, 1e-6)
    assert error(kv, exact) < 1e-2 and kv[:, 1].double().equal(exact[:, 1])


@pytest.mark.parametrize("D, n, k, vocab", [(8, 59, 10, 16384), (15, 63, 10, 151936), (7, 127, 10, 32000),
                                            (1, 9, 10, 99)])
def test_grid(D: int, n: int, k: int, vocab: int) -> None:
    """Fails if the kernel's nodes are not the twin's, on the same logits and noise."""
    logits, noise = 4 * torch.randn(D, vocab), torch.randn(D + 1, vocab + 50)
    ids = torch.randperm(vocab + 50)[:vocab].sort().values
    found = []
    for steps, device in ((tree, "cpu"), (tree_kernels, "cuda")):
        candidates = tree.empty_candidates(D * n, torch.device(device), 5)
        steps.grid(logits.to(device), candidates, n, k, ids.to(device), noise.to(device))
        found.append([t.cpu() for t in candidates[:3]])
    assert found[0][0].equal(found[1][0]) and found[0][2].equal(found[1][2])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab, rank, k", [(16384, 128, 10), (49152, 512, 10), (151936, 256, 10), (1000, 40, 3)])
def test_grow_markov(vocab: int, rank: int, k: int, dtype: torch.dtype) -> None:
    """Fails if a product of W1 and W2 is wrong on real tensor cores, or if a level depends on which program ends first:
    five runs must give the same bits, and the twin's nodes."""
    torch.manual_seed(rank)
    w1, w2 = randn(vocab, rank, dtype=dtype) * 0.2, randn(vocab, rank, dtype=dtype) * 0.2
    logits, noise = randn(5, vocab, dtype=torch.float32) * 3, randn(vocab + 50, dtype=torch.float32)
    ids = torch.randperm(vocab + 50, device="cuda")[:vocab].sort().values
    w1 = torch.cat((w1, w1[:50]))  # a row for each token
    found = []
    runs = 5 * [(markov.grow_markov, w1, w2)] + [(markov.grow_markov_torch, w1.double(), w2.double())]
    for grow, *weights in runs:
        level, candidates = tree.start_tree(k, 5, w1.device)
        for depth in range(5):
            level = grow(logits[depth:depth + 1], *weights, level, candidates, depth, k, ids, noise)
        found.append([*level, *candidates[:3]])
    for run in found[1:5]:
        assert all(a.equal(b) for a, b in zip(run, found[0], strict=True))
    for ours, exact in zip(found[0], found[5], strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("vocab, k, depth, nodes", [(32000, 10, 6, 59), (49152, 3, 3, 59), (128256, 10, 8, 127),
                                                   (128256, 1, 1, 59)])
def test_tree_steps(vocab: int, k: int, depth: int, nodes: int) -> None:
    """Fails if a kernel of ops/tree.py gives something else than its twin in tree.py on the same logits."""
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
        made = steps.rerank(state, candidates, min(nodes, len(candidates.tokens)), depth)
        chosen = steps.argmax(torch.randn(len(made.tokens), vocab, generator=random).to(device))
        chosen[:1] = made.tokens[1]
        report = torch.zeros(depth + 3, dtype=torch.int64, device=device)
        path = steps.accept_commit(made, chosen, state, chosen[:0], zero + 60, depth, report)
        results.append([t.cpu() for t in (*candidates[:3], *made, *begun, best, chosen, path, state.length, state.done,
                                          report[:4])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("T, C, D", [(1, 576, 64), (10, 4096, 128), (64, 5120, 128), (512, 8192, 128)])
def test_beginning_and_end(T: int, C: int, D: int) -> None:
    """Fails if the kernels at the two ends of a forward are wrong: embeddings and angles, a draft head's too, and the
    last norm."""
    table, rope, onward = randn(300, C), randn(2, 90, D), randn(70, C + 32, dtype=torch.float32)[:, 32:]
    tokens, places, rows = (torch.randint(n, (T,), device="cuda") for n in (300, 90, 70))
    for args in ((), (onward, rows), *([(onward[:T],)] if T <= 70 else [])):
        for ours, theirs in zip(embed_rope.embed(table, tokens, rope, places, *args),
                                embed_rope.embed_torch(table, tokens, rope, places, *args), strict=True):
            assert torch.equal(ours, theirs)
    x, weight = randn(2, T, C), randn(C)
    for given in ((randn(70, C), rows), *([(randn(T, C), None)] if T <= 512 else [])):
        args = weight, *given, randn(C), 1e-5, rope, places, T == 10
        for ours, theirs in zip(embed_rope.embed_pair(table, tokens, *args),
                                embed_rope.embed_pair_torch(table, tokens, *args), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    exact = torch.nn.functional.rms_norm(x.double(), (C,), weight.double(), 1e-5)
    assert error(linear.rms_norm(x, weight, 1e-5), exact) < 1e-2


def test_noise() -> None:
    """Fails if the kernel's noise is not that of its twin, whose distribution is tested on a CPU."""
    seed, places = torch.tensor(-7), torch.arange(5) * 10**6
    ours = sampling.gumbel_noise(seed.cuda(), places.cuda(), 49152).cpu()
    torch.testing.assert_close(ours, sampling.gumbel_noise(seed, places, 49152), rtol=1e-5, atol=1e-5)


def test_graphs_share_memory() -> None:
    """Fails if the graphs' memory is given up with the last graph that used it, so that the next capture fails, or if
    each graph takes memory of its own."""
    x = torch.zeros(1 << 24, device="cuda")
    reserved = []
    for _ in range(3):
        replay = capture(lambda: (x + 1).sum())
        replay()
        del replay
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[0] == reserved[-1]
