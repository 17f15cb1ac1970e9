"""ops/attention.py and ops/embed_rope.py against float64 loops and model.py: the PyTorch twins, and the Triton kernels
in Triton's interpreter (tests/triton_tools.py). What the compiler accepts, and what the machine code needs of a GPU, is
in test_attention_aot.py."""
import pytest
import torch
from torch import Tensor
from triton_tools import interpreted, not_interpreted

from model import RMSNorm, apply_rope
from ops import attention, embed_rope
from tree import Tree, build_tree

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]
TREE = (16, 32, 4, 4, 2)  # a config: BM, BN, NS, warps, stages

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy, of splits that see nothing


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests below fails with the Triton kernels."""
    interpreter(__file__)


def random_tree(nodes: int) -> tuple[Tree, Tensor]:
    """A tree and its ancestors as the bits [nodes, 1] of a mask, as verification has them."""
    parents = torch.tensor([0] + [int(torch.randint(i, ())) for i in range(1, nodes)])
    tree = build_tree(torch.arange(nodes), parents, nodes)
    return tree, tree.ancestors


def reference(q: Tensor, kv: Tensor, base: int, bits: Tensor | None) -> Tensor:
    """What tree_attention's docstring says, one row and one head at a time, in float64."""
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
    """Compare with the reference. The slots that no bit can name hold NaN, so that reading one of them shows."""
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
@pytest.mark.parametrize("T", [1, 7, 10, 16, 64])
def test_random_trees(implementation, T):
    """Fails if rows are lost that end within a tile, at its edge or in the next, or if bit 63, the sign, is ignored."""
    check(implementation, T, 70, random_tree(T)[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 1, 31, 32, 33, 96, 150])
@pytest.mark.parametrize("causal", [False, True])
def test_where_the_prefix_ends(implementation, base, causal):
    """Fails if a block counts as unmasked that does not end at or below base, or if bits beyond the end of the cache,
    which 150 + 10 slots fill, are followed."""
    check(implementation, 10, base, None if causal else random_tree(10)[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("H, K, D", [(6, 2, 16), (4, 1, 16), (7, 1, 16), (8, 1, 64), (2, 1, 80), (2, 2, 96),
                                     (1, 1, 128)])
def test_shapes(implementation, H, K, D):
    """Fails for some ratio of heads, a tile that ends amid a token's heads, or a head dim that is no power of two."""
    check(implementation, 5, 40, random_tree(5)[1], H=H, K=K, D=D, S=128)
    check(implementation, 5, 40, None, H=H, K=K, D=D, S=128)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 31])
def test_two_words(implementation, base):
    """Fails if the second word of bits is ignored, or if every row is taken to see node 0, which lies in slot 31, the
    last of its block. The bits are random."""
    low, high = torch.randint(-2**63, 2**63 - 1, (2, 10, 1))
    check(implementation, 10, base, torch.cat((low, high), 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 77])
def test_prefill(implementation, base):
    """Fails if 150 causal rows, in tiles of 128 and without splits, see too much or too little."""
    check(implementation, 150, base, None, S=240, config=(128, 64, 1, 8, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("base", [0, 1, 31, 32, 100])
def test_one_row(implementation, base):
    """Fails if plain decoding's single row is cut off at a block's edge, with a mask of bits or without."""
    check(implementation, 1, base, None, H=2, K=2)
    check(implementation, 1, base, torch.ones(1, 1, dtype=torch.int64), H=1, D=80, S=164)


@interpreted
@pytest.mark.parametrize("base", [0, 1, 31, 32, 33, 64, 96, 150])
def test_loaded_early(base):
    """Fails if the block that is loaded before the wait for the previous kernel is used twice or not at all, lacks the
    slots that come after the wait, or is taken for one where there is none."""
    for T, bits in ((1, None), (1, torch.ones(1, 1, dtype=torch.int64)), (10, random_tree(10)[1]), (10, None)):
        check("triton", T, base, bits, early=True)
    check("triton", 3, base, torch.randint(-2**63, 2**63 - 1, (3, 2)), S=300, config=(16, 32, 8, 4, 2), early=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scores_far_below_zero(implementation):
    """Fails if the running maximum starts at 0: then all weights are exp(-3600)."""
    q, kv = torch.full((1, 1, 16), 30.0), torch.randn(2, 1, 64, 16)
    kv[0] = -30 + 0.01 * kv[0]
    options = {"config": TREE} if implementation == "triton" else {}
    out = getattr(attention, f"tree_attention_{implementation}")(q, kv, torch.tensor(40), **options)
    torch.testing.assert_close(out.double(), reference(q, kv, 40, None), rtol=0, atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation):
    """Fails if the weights are not rounded to the values' dtype. In fp16: the interpreter multiplies bf16 as
    integers."""
    check(implementation, 20, 70, random_tree(20)[1], D=64, dtype=torch.float16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("NS", [2, 3, 8])
def test_splits(implementation, NS):
    """Fails if the number of splits does not divide that of the blocks, or if there are more splits than blocks."""
    bits = random_tree(10)[1]
    for base in (5, 90):
        check(implementation, 10, base, bits, K=2, config=(16, 32, NS, 4, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("T, H, K, D, norm", [(1, 4, 4, 64, False), (7, 9, 3, 16, True), (5, 7, 1, 80, False),
                                              (3, 4, 2, 32, True)])
def test_rope_store(implementation, dtype, T, H, K, D, norm):
    """Fails if rotation or norms differ from model.py's (in the twin: by one bit), or if other slots of the cache
    change."""
    qkv, kv = torch.randn(T, (H + 2 * K) * D).to(dtype), torch.randn(2, K, 40, D).to(dtype)
    rope = torch.randn(2, 50, D // 2).repeat(1, 1, 2).to(dtype)
    rope_pos, slots = torch.randint(50, (T,)), torch.randperm(40)[:T]
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
    expected[:, :, slots] = torch.stack((k, v[0])).transpose(1, 2)
    out = getattr(embed_rope, f"rope_store_{implementation}")(qkv, rope, slots, kv, **weights)
    exact = implementation == "torch" or dtype == torch.float16 and not norm
    tolerance = {"rtol": 0, "atol": 0 if exact else 2e-6 if dtype == torch.float32 else 8e-3}
    torch.testing.assert_close(out, q, **tolerance)
    torch.testing.assert_close(kv, expected, **tolerance)
    assert torch.equal(kv[1], expected[1])  # values are copied


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed(implementation):
    """Fails if a row is another token's, if sines stand where cosines belong, or if a column is read past the end of a
    row or before its beginning."""
    table, wide, rope = torch.randn(50, 24), torch.randn(9, 70), torch.randn(2, 40, 34)
    embed = getattr(embed_rope, f"embed_{implementation}")
    for n, columns in ((1, slice(46, None)), (7, slice(5, 29)), (9, slice(24))):
        tokens, rows, positions = (torch.randint(m, (n,)) for m in (50, 9, 40))
        for addend, addend_rows, expected in (
                (None, None, table[tokens]),
                (wide[:, columns], rows, table[tokens] + wide[rows, columns]),
                (wide[:n, columns], None, table[tokens] + wide[:n, columns])):
            x, angles = embed(table, tokens, rope, positions, addend, addend_rows)
            assert torch.equal(x, expected)
            assert torch.equal(angles, rope[:, positions])
        batch = torch.randint(50, (3, n + 2))[:, 1:-1]
        x, angles = embed(table, batch, rope, positions)
        assert torch.equal(x, table[batch]) and torch.equal(angles, rope[:, positions])
    x, _ = embed(table.half(), tokens, rope, positions, wide[:, columns], rows)
    assert torch.equal(x, (table.half()[tokens].float() + wide[rows, columns]).half())  # rounded once


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_embed_pair(implementation):
    """Fails if the two norms or halves are swapped, a row is another token's or another parent's, the residual is
    normed where it should not be, or a row reads past its end."""
    C, eps = 24, 0.05
    table, features, rope = torch.randn(50, C), torch.randn(9, C), torch.randn(2, 40, 10)
    embed_norm, feature_norm = torch.randn(C), torch.randn(C)

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    embed_pair = getattr(embed_rope, f"embed_pair_{implementation}")
    for n in (1, 7, 9):
        tokens, rows, positions = (torch.randint(m, (n,)) for m in (50, 9, 40))
        for parent_rows, feature in ((None, features[:n]), (rows, features[rows])):
            for is_normed in (False, True):
                given = features[:n] if parent_rows is None else features
                x, residual, angles = embed_pair(table, tokens, embed_norm, given, parent_rows, feature_norm, eps, rope,
                                                 positions, is_normed)
                normed = norm(feature, feature_norm)
                torch.testing.assert_close(x, torch.cat((norm(table[tokens], embed_norm), normed), -1))
                torch.testing.assert_close(residual, normed if is_normed else feature)
                assert torch.equal(angles, rope[:, positions])


def test_tensors_on_a_cpu_go_to_the_twins():
    """Fails if a kernel is launched on a CPU, for which Triton has no backend."""
    q, kv, base = torch.randn(3, 2, 8), torch.randn(2, 1, 9, 8), torch.tensor(4)
    assert torch.equal(attention.tree_attention(q, kv, base), attention.tree_attention_torch(q, kv, base))
