"""Sliding windows of ops/attention.py: the PyTorch twin and, in the interpreter, the Triton kernel against float64
loops, and the kernel through the compiler. test_attention.py has all that is the same without a window."""
import pytest
import torch
from torch import Tensor
from triton_tools import CARDS, assert_fits, cards, compile_ahead, interpreted, not_interpreted

from ops import attention, cpu_kernels
from ops.attention import TreeMask, attention_config, attention_kernel, tree_mask

IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=interpreted)]
TREE = (16, 32, 4, 4, 2)  # a config: BM, BN, NS, warps, stages

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")  # numpy, of splits that see nothing


@pytest.mark.slow
@not_interpreted
@pytest.mark.xdist_group("interpreter")
def test_in_the_interpreter(interpreter) -> None:
    """Fails if one of the tests below fails with the Triton kernels."""
    interpreter(__file__)


def block_bits(rows: int, causal: bool) -> Tensor:
    """Rows of a block that see its earlier rows, or all of its rows: [rows, 1] int64."""
    words = [(1 << (row + 1 if causal else rows)) - 1 for row in range(rows)]
    return torch.tensor([[word - (word >> 63 << 64)] for word in words])


def seen_slots(base: int, row: int, bits: Tensor | None, window: int) -> list[int]:
    """What TreeMask's docstring says of one row."""
    own = range(row + 1) if bits is None else [
        j for j in range(64 * bits.shape[1]) if int(bits[row, j // 64]) >> j % 64 & 1]
    return [*range(max(0, base + row - window + 1), base), *(base + j for j in own)]


def check(implementation: str, T: int, base: int, bits: Tensor | None, window: int, *, H: int = 2, K: int = 1,
          D: int = 16, S: int = 240, config: tuple = TREE, early: bool = False) -> None:
    """Compare with the rows one by one, in float64. The slots of blocks that no row sees hold NaN, so that reading one
    of them shows; PyTorch's attention reads all."""
    q, kv = torch.randn(T, H, D), torch.randn(2, K, S, D)
    kv[:, :, base + (T if bits is None else 64 * bits.shape[1]):] = torch.nan
    options = {}
    if implementation == "triton":
        options, BN = {"config": config, "early": early}, config[1]
        kv[:, :, :min(max(base - window + 1, 0), base) // BN * BN] = torch.nan
    out = getattr(attention, f"tree_attention_{implementation}")(q, kv, torch.tensor(base), bits, window, **options)
    expected = torch.empty(T, H, D, dtype=torch.float64)
    for row in range(T):
        slots = seen_slots(base, row, bits, window)
        for h in range(H):
            keys, values = kv[:, h // (H // K), slots].double()
            expected[row, h] = (keys @ q[row, h].double() / D**0.5).softmax(0) @ values
    torch.testing.assert_close(out.double(), expected.flatten(1), rtol=0, atol=3e-6)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [1, 5, 33, 64, 1000])
@pytest.mark.parametrize("base", [0, 32, 150])
def test_where_the_window_begins(implementation, base, window):
    """Fails if a row sees a slot too much or too few, if a block with the first visible slot is left out, or if slots
    from base on are cut: with a window of 1, the last row still sees all rows of a block that sees itself."""
    check(implementation, 7, base, block_bits(7, causal=False), window)
    check(implementation, 7, base, block_bits(7, causal=True), window)
    check(implementation, 7, base, None, window)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("H, K", [(6, 2), (7, 1)])
def test_several_tiles(implementation, H, K):
    """Fails if a tile begins with the window of another tile's rows, or behind the first row of the block, which all of
    its rows see, or if a row of a tile that starts amid a token's heads counts as another token's."""
    check(implementation, 16, 100, block_bits(16, causal=True), 9, H=H, K=K)
    check(implementation, 24, 100, None, 40, H=H, K=K)
    check(implementation, 24, 90, block_bits(24, causal=False), 3, H=H, K=K)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("NS", [1, 2, 3, 8])
def test_splits(implementation, NS):
    """Fails if the splits do not share the blocks of the window alone, or if one that sees nothing has a weight, also
    where the first block is loaded early."""
    for base, window in ((150, 3), (150, 70), (5, 70)):
        for early in (False, True):
            check(implementation, 16, base, block_bits(16, causal=False), window, K=2, config=(16, 32, NS, 4, 2),
                  early=early)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_words(implementation):
    """Fails if rows beyond the first 64 slots of their own block are cut by a window, or not cut before it."""
    low, high = torch.randint(-2**63, 2**63 - 1, (2, 10, 1)) | 1
    check(implementation, 10, 90, torch.cat((low, high), 1), 20)


def test_dense(monkeypatch):
    """Fails if `tree_mask` loses the window, or if the mask for PyTorch is not what the kernel reads."""
    bits, base = block_bits(3, causal=True), torch.tensor(5)
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    for window in (1, 2, 4, 100):
        mask = tree_mask(base, bits, 12, window)
        assert mask.equal(TreeMask(base, bits, window).dense(3, 12))
        for row, seen in enumerate(mask):
            assert seen.nonzero().flatten().tolist() == seen_slots(5, row, bits, window)
    assert tree_mask(base, bits, 12).equal(tree_mask(base, bits, 12, 100))
    monkeypatch.setattr(cpu_kernels, "library", lambda: "kernels")
    assert tree_mask(base, bits, 12, 4) == TreeMask(base, bits, 4)


@pytest.mark.slow
@not_interpreted
@pytest.mark.parametrize("arch", cards("windows", (86, 89, 90)))
@pytest.mark.parametrize("T, H, K, D, dtype", [(7, 32, 8, 128, "bf16"), (16, 28, 4, 128, "bf16"),
                                               (16, 32, 8, 128, "fp32")])
def test_compiled(arch, T, H, K, D, dtype):
    """Fails if a window makes the kernel spill or want too much shared memory, or if keys and values do not come 16
    bytes at a time, into shared memory and ahead of their use."""
    sms = CARDS[86 if arch == 89 else arch]  # with as many splits, sm_89 gets the code of sm_86
    type_ = torch.bfloat16 if dtype == "bf16" else torch.float32
    BM, BN, NS, warps, stages = attention_config(T, H // K, K, D, type_, sms, divmod(arch, 10))
    types = {"q": f"*{dtype}", "kv": f"*{dtype}", "base": "*i64", "bits": "*i64", "out": f"*{dtype}", "parts": "*fp32",
             "logs": "*fp32", "S": "i32"}
    unused = dict.fromkeys([] if NS > 1 else ["parts", "logs"])
    constants = {"T": T, "H": H, "K": K, "D": D, "DP": D, "WORDS": 1, "WINDOW": 2048, "EARLY": False, "BM": BM,
                 "BN": BN, "NS": NS, "PDL": arch >= 90}
    made = compile_ahead(attention_kernel, arch, types, unused | constants, warps, stages)
    assert_fits(made, arch, "attention with a window")
    assert ("cp.async.cg.shared.global" if stages > 1 else ".v4.b32") in made.ptx
