"""kernels.py against float64 loops and model.py: the PyTorch twins, and the Triton kernels in Triton's interpreter.

The interpreter must be chosen before anything imports Triton, so one test runs this file again in a process of its
own; `TRITON_INTERPRET=1 pytest tests/test_kernels.py` shows its cases singly. What an interpreter cannot show, what
the compiler accepts and what the code needs of a GPU, is in test_kernels_aot.py.
"""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import RMSNorm, apply_rope
from ops import attention
from tree import Tree, build_tree

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETER, reason="see above"))]
TREE = (16, 32, 4, 4, 2)  # a config: BM, BN, NS, warps, stages
ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy, of splits that see nothing


@pytest.mark.skipif(INTERPRETER, reason="this is that process")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_twins_need_no_compiler():
    """PyTorch for CPUs brings no Triton: nothing at import may need it."""
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels; q = torch.ones(1, 1, 4); "
            "print(attention.tree_attention(q, torch.ones(2, 1, 8, 4), torch.tensor(3)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "tensor([[1., 1., 1., 1.]])", done.stderr


def random_tree(nodes: int) -> tuple[Tree, Tensor]:
    """A tree and its bits [nodes, 1], like those of verification."""
    parents = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, nodes)])
    tree = build_tree(torch.arange(nodes), parents, nodes)
    return tree, tree.ancestors[:, None].contiguous()


def reference(q: Tensor, kv: Tensor, base: int, bits: Tensor | None) -> Tensor:
    """What tree_attention says it does, one row and one head at a time."""
    (T, H, D), K = q.shape, kv.shape[1]
    out = torch.empty(T, H, D, dtype=torch.float64)
    for i in range(T):
        nodes = range(i + 1) if bits is None else [
            j for j in range(64 * bits.shape[1]) if int(bits[i, j // 64]) >> j % 64 & 1]
        slots = [*range(base), *(base + j for j in nodes)]
        for h in range(H):
            keys, values = kv[:, h // (H // K), slots].double()
            out[i, h] = (keys @ q[i, h].double() / D**0.5).softmax(0) @ values
    return out.flatten(1)


def check(implementation: str, T: int, base: int, bits: Tensor | None, *, H: int = 2, K: int = 1, D: int = 16,
          S: int = 160, config: tuple = TREE, dtype: torch.dtype = torch.float32, **options: bool) -> Tensor:
    """Compare with the reference; the slots that no bit can name hold NaN, so that one read too many shows."""
    q, kv = torch.randn(T, H, D).to(dtype), torch.randn(2, K, S, D).to(dtype)
    kv[:, :, base + (T if bits is None else 64 * bits.shape[1]):] = torch.nan
    options = {"config": config, **options} if implementation == "triton" else {}
    out = getattr(attention, f"tree_attention_{implementation}")(q, kv, torch.tensor(base), bits, **options)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(q, kv, base, bits), rtol=0,
                               atol=3e-6 if dtype == torch.float32 else 4e-3)
    return out


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("T", [1, 7, 10, 16, 32, 60, 64])
def test_random_trees(implementation, T):
    """Rows that end within a tile, at its edge and in the next; bit 63, which is the sign."""
    check(implementation, T, 70, random_tree(T)[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 1, 31, 32, 33, 96, 150])
@pytest.mark.parametrize("causal", [False, True])
def test_where_the_prefix_ends(implementation, base, causal):
    """The unmasked blocks end at or below base; 150 + 10 slots fill the cache, and the bits could name more."""
    check(implementation, 10, base, None if causal else random_tree(10)[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("H, K, D", [(4, 4, 16), (6, 2, 16), (8, 2, 16), (7, 1, 16), (8, 1, 64), (2, 1, 80), (2, 2, 96),
                                     (1, 1, 128)])
def test_shapes(implementation, H, K, D):
    """Every ratio of heads, tiles that end amid a token's heads, head dims that fill no power of two."""
    check(implementation, 5, 40, random_tree(5)[1], H=H, K=K, D=D, S=128)
    check(implementation, 5, 40, None, H=H, K=K, D=D, S=128)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 31])
def test_two_words(implementation, base):
    """Bits as they come, so that not every row sees node 0, in slot 31 the last of its block."""
    low, high = torch.randint(-2**63, 2**63 - 1, (2, 10, 1))
    check(implementation, 10, base, torch.cat((low, high), 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 77])
def test_prefill(implementation, base):
    check(implementation, 512, base, None, S=600, config=(128, 64, 1, 8, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 1, 31, 32, 100])
def test_one_row(implementation, base):
    check(implementation, 1, base, None, H=2, K=2)
    check(implementation, 1, base, torch.ones(1, 1, dtype=torch.int64), H=1, D=80, S=164)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_far_below_zero(implementation):
    """A running maximum that starts at 0 leaves sums of exp(-3600)."""
    q, kv = torch.full((1, 1, 16), 30.0), torch.randn(2, 1, 64, 16)
    kv[0] = -30 + 0.01 * kv[0]
    options = {"config": TREE} if implementation == "triton" else {}
    out = getattr(attention, f"tree_attention_{implementation}")(q, kv, torch.tensor(40), **options)
    torch.testing.assert_close(out.double(), reference(q, kv, 40, None), rtol=0, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation):
    """p is rounded to the values' dtype. fp16: the interpreter multiplies bf16 as integers."""
    check(implementation, 20, 70, random_tree(20)[1], D=64, dtype=torch.float16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("NS", [2, 3, 8])
def test_splits(implementation, NS):
    """Splits that do not divide the blocks, and more of them than blocks."""
    bits = random_tree(10)[1]
    for base in (5, 90):
        check(implementation, 10, base, bits, K=2, config=(16, 32, NS, 4, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T, H, K, D, norm", [(1, 4, 4, 64, False), (7, 9, 3, 16, True), (5, 7, 1, 80, False),
                                              (3, 4, 2, 32, True)])
def test_rope_store(implementation, dtype, T, H, K, D, norm):
    """model.py's rotation and norms, to the bit in the twin; the other slots of the cache stay as they were."""
    qkv, kv = torch.randn(T, (H + 2 * K) * D).to(dtype), torch.randn(2, K, 40, D).to(dtype)
    rope = torch.randn(2, 50, D // 2).repeat(1, 1, 2).to(dtype)
    rope_pos, cache_pos = torch.randint(50, (T,)), torch.randperm(40)[:T]
    q, k, v = qkv.view(1, T, -1, D).split((H, K, K), dim=2)
    weights = {}
    if norm:
        norms = [RMSNorm(D, 1e-5).to(dtype).requires_grad_(False) for _ in range(2)]
        weights = {"q_norm": torch.nn.init.normal_(norms[0].weight), "k_norm": torch.nn.init.normal_(norms[1].weight),
                   "eps": 1e-5}
        q, k = norms[0](q), norms[1](k)
    rope = rope[:, rope_pos]
    q, k = (apply_rope(x, rope)[0] for x in (q, k))
    expected = kv.clone()
    expected[:, :, cache_pos] = torch.stack((k, v[0])).transpose(1, 2)
    out = getattr(attention, f"rope_store_{implementation}")(qkv, rope, cache_pos, kv, **weights)
    exact = implementation == "torch" or dtype == torch.float16 and not norm
    tolerance = {"rtol": 0, "atol": 0 if exact else 2e-6 if dtype == torch.float32 else 8e-3}
    torch.testing.assert_close(out, q, **tolerance)
    torch.testing.assert_close(kv, expected, **tolerance)
    assert torch.equal(kv[1], expected[1])  # values are copied


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed(implementation):
    """A row of another token, sines where cosines belong, a column past the end of a row, or of the columns before."""
    table, onward, rope = torch.randn(50, 24), torch.randn(9, 70), torch.randn(2, 40, 34)
    embed = getattr(attention, f"embed_{implementation}")
    for n, columns in ((1, slice(46, None)), (7, slice(5, 29)), (9, slice(24))):
        tokens, rows, places = (torch.randint(m, (n,)) for m in (50, 9, 40))
        for above, fed in ((None, None), (rows, onward[:, columns]), (None, onward[:n, columns])):
            x, angles = embed(table, tokens, rope, places, fed, above)
            assert torch.equal(x, table[tokens] + (0 if fed is None else fed if above is None else fed[above]))
            assert torch.equal(angles, rope[:, places])
        batch = torch.randint(50, (3, n + 2))[:, 1:-1]
        x, angles = embed(table, batch, rope, places)
        assert torch.equal(x, table[batch]) and torch.equal(angles, rope[:, places])
    x, _ = embed(table.half(), tokens, rope, places, onward[:, columns], rows)
    assert torch.equal(x, (table.half()[tokens].float() + onward[rows, columns]).half())  # rounded once


def test_tensors_on_a_cpu_go_to_the_twins():
    """Triton has no CPU backend: a launch would fail."""
    q, kv, base = torch.randn(3, 2, 8), torch.randn(2, 1, 9, 8), torch.tensor(4)
    assert torch.equal(attention.tree_attention(q, kv, base), attention.tree_attention_torch(q, kv, base))
