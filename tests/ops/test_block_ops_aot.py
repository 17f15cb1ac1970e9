"""ops/tree.grid and ops/context.py through Triton's compiler, without a GPU (tests/triton_tools.py). The numbers are
test_block_ops.py's."""
import pytest
from triton_tools import assert_fits, compile_ahead, not_interpreted

from ops.context import store_context_kernel
from ops.topk import best_of_block_kernel
from ops.tree import grid_kernel

pytestmark = [pytest.mark.slow, not_interpreted]


def check(kernel, types: dict[str, str], warps: int, divisible: tuple[str, ...] = (), **constants) -> None:
    pytest.importorskip("triton")
    for arch in (86, 89, 90):
        made = compile_ahead(kernel, arch, types, constants | {"PDL": arch >= 90}, warps, divisible=divisible)
        assert_fits(made, arch, (kernel.__name__, constants))
        before_reading = made.ptx[:made.ptx.index("ld.global")]
        assert ("griddepcontrol.wait" in before_reading) == (arch >= 90)


@pytest.mark.parametrize("k, beam, pairs", [(10, 128, 512)])
def test_grid(k: int, beam: int, pairs: int) -> None:
    """Fails if the kernel does not compile for trees of 128 nodes (test_tree_ops_aot.py has smaller ones), if it
    spills, if it wants too much shared memory, or if it reads before the previous kernel has ended."""
    types = {"children": "*i64", "logs": "*fp32", "tokens": "*i64", "scores": "*fp32", "parents": "*i64"}
    check(grid_kernel, types | {"D": "i32", "n": "i32"}, pairs // 64 or 1, K=k, BEAM=beam, PAIRS=pairs)


@pytest.mark.parametrize("block, warps", [(1024, 4), (4096, 2)])
def test_noise_for_each_row(block: int, warps: int) -> None:
    """Fails like test_grid: the best tokens of rows that have a row of noise each."""
    types = {"logits": "*fp32", "noise": "*fp32", "ids": "*i64", "keys": "*i64", "peaks": "*fp32", "sums": "*fp32"}
    check(best_of_block_kernel, types | {"V": "i32", "stride": "i32"}, warps, ("V", "stride"), NOISE_STRIDE=151936,
          K=10, BLOCK=block, SUM=True)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("size", [24, 64, 128])
def test_store_context(dtype: str, size: int) -> None:
    """Fails like test_grid, for heads of some sizes."""
    types = dict.fromkeys(("rows", "rope", "kv", "k_norms"), f"*{dtype}") | {"slots": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(("HEADS", "S", "plane"), "i32")
    padded = 1 << (size - 1).bit_length()
    check(store_context_kernel, types, 1, ("HEADS", "plane"), K=8, D=size, DP=padded, BH=4)
