"""ops/attention.py and ops/embed_rope.py through Triton's compiler, without a GPU: every config that attention_config
gives compiles for every architecture, fits its shared memory and spills no register. test_attention.py checks the
numbers; speed needs a GPU."""
import compiled_kernels
import pytest
import torch
from triton_tools import Compiled, assert_fits, compile_ahead, compile_linear, not_interpreted

from ops.attention import attention_config, attention_kernel, merge_splits_kernel
from ops.embed_rope import embed_kernel, embed_pair_kernel, rope_store_kernel
from ops.tiling import Tiling

triton = pytest.importorskip("triton")
pytestmark = not_interpreted

SMS = {86: (82, 84), 89: (76, 128), 90: (114, 132)}  # 3090, A40; 4080, 4090; H100 PCIe, SXM
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LLAMA2, LLAMA3, SMOL, QWEN, CODER = (32, 32, 128), (32, 8, 128), (9, 3, 64), (28, 4, 128), (12, 2, 128)  # H, K, D
ODD, FALCON = (32, 32, 80), (12, 4, 256)
CASES = [  # T, (H, K, D), words of bits, dtype; each tile with the largest heads that it is used for
    (1, LLAMA2, 0, "bf16"), (10, LLAMA2, 1, "bf16"), (60, LLAMA2, 2, "bf16"), (512, LLAMA2, 0, "bf16"),
    (32, LLAMA2, 0, "bf16"), (60, QWEN, 1, "bf16"), (10, SMOL, 1, "bf16"), (60, ODD, 1, "bf16"),
    (32, CODER, 1, "bf16"), (1, FALCON, 1, "bf16"), (10, FALCON, 1, "bf16"), (60, FALCON, 1, "bf16"),
    (512, FALCON, 0, "bf16"), (10, LLAMA2, 1, "fp32"), (60, LLAMA2, 1, "fp32")]


def compile_checked(kernel, arch: int, types: dict[str, str], warps: int, stages: int = 3, **constants) -> Compiled:
    made = compile_ahead(kernel, arch, types, constants, warps, stages)
    assert_fits(made, arch, kernel.__name__)
    return made


def compile_attention(arch: int, T: int, shape: tuple[int, int, int], words: int, dtype: str, sms: int,
                      pdl: bool = False, early: bool = False) -> Compiled:
    """attention_kernel with the config that such a card gets."""
    H, K, D = shape
    BM, BN, NS, warps, stages = attention_config(T, H // K, K, D, DTYPES[dtype], sms, divmod(arch, 10))
    unused = ([] if NS > 1 else ["parts", "logs"]) + ([] if words else ["bits"])
    types = {"q": f"*{dtype}", "kv": f"*{dtype}", "base": "*i64", "bits": "*i64", "out": f"*{dtype}", "parts": "*fp32",
             "logs": "*fp32", "S": "i32"}
    return compile_checked(attention_kernel, arch, types, warps, stages, **dict.fromkeys(unused), T=T, H=H, K=K, D=D,
                           DP=triton.next_power_of_2(D), WORDS=words, WINDOW=0, EARLY=early, BM=BM, BN=BN, NS=NS,
                           PDL=pdl)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(arch, case):
    """Fails if a config spills or wants too much shared memory, or if keys and values do not come 16 bytes at a time,
    and, where a program has several blocks, into shared memory and ahead of their use. sm_89 gets the code of sm_86,
    but for the number of splits."""
    T, (H, K, D), _, dtype = case
    stages = attention_config(T, H // K, K, D, DTYPES[dtype], SMS[arch][1], divmod(arch, 10))[-1]
    wide = "cp.async.cg.shared.global" if stages > 1 else ".v4.b32"
    assert wide in compile_attention(arch, *case, SMS[arch][1]).ptx
    if arch == 86:
        compile_attention(89, *case, SMS[86][1])


@pytest.mark.slow
def test_dependent_launch_is_in_the_code_only_where_asked_for():
    """Fails if a kernel waits for the previous one unasked (sm_86 has no such instruction), or too late."""
    assert "griddepcontrol" not in compile_attention(90, 10, LLAMA2, 1, "bf16", 132).ptx
    ptx = compile_attention(90, 10, LLAMA2, 1, "bf16", 132, pdl=True).ptx
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[0] <= 60 and case[2] and case[3] == "bf16"], ids=str)
def test_loads_before_the_wait(case):
    """Fails if a block that is loaded early spills on Hopper, or is loaded after the wait for the previous kernel."""
    ptx = compile_attention(90, *case, 132, pdl=True, early=True).ptx
    before, after = ptx.split("griddepcontrol.wait")
    assert before.count("ld.global") > 4 and after.count("ld.global") > 4


@pytest.mark.slow
def test_the_same_ptx(monkeypatch):
    """Fails if the cards of compiled_kernels.SAME_PTX get different PTX, so that what was compiled for one of them
    must not serve the others."""
    archs = compiled_kernels.SAME_PTX
    monkeypatch.setattr(compiled_kernels, "SAME_PTX", ())
    for compile_for in (lambda arch: compile_attention(arch, 10, SMOL, 1, "bf16", 128),
                        lambda arch: compile_linear(Tiling(16, 64, 64, 2, 4, 2), True, arch, True, True),
                        lambda arch: compile_linear(Tiling(8, 64, 64, 1, 4, 2), True, arch, True, False, planes=2,
                                                    group=64)):
        assert len({compile_for(arch).code for arch in archs}) == 1


def test_no_other_config_is_ever_returned():
    """Fails if some number of heads or rows, or some GPU, gets tiles or stages that are not among those compiled
    above."""
    def tile(T, H, K, D, dtype, sms, capability):
        BM, BN, NS, warps, stages = attention_config(T, H // K, K, D, DTYPES[dtype], sms, capability)
        assert 1 <= NS <= (16 if capability >= (9, 0) else 8)
        return dtype, BM, BN, warps, stages
    for arch in SMS:
        capability = divmod(arch, 10)
        tested = {tile(T, *shape, dtype, SMS[arch][1], capability) for T, shape, _, dtype in CASES}
        for T in (*range(1, 65), 128, 512):
            for shape in (LLAMA2, LLAMA3, SMOL, QWEN, CODER, ODD, (64, 8, 128), (40, 40, 128), (71, 1, 64)):
                for sms in SMS[arch]:
                    for dtype in ("bf16", "fp32"):
                        assert tile(T, *shape, dtype, sms, capability) in tested
    assert attention_config(512, 1, 32, 128, torch.bfloat16, 132, (9, 0))[2] == 1  # one split: no merge


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 90])
def test_the_other_kernels(arch):
    """Fails if one of the small kernels spills or wants too much shared memory."""
    def check(kernel, warps: int, **constants) -> None:
        types = dict.fromkeys(kernel.arg_names, "*bf16") | dict.fromkeys(("S", "stride", "C", "T"), "i32")
        types |= dict.fromkeys(("slots", "tokens", "positions", "addend_rows", "parent_rows"), "*i64")
        types |= {"eps": "fp32"} | dict.fromkeys(("parts", "logs", "addend"), "*fp32")
        compile_checked(kernel, arch, types, warps, PDL=False, **constants)

    check(rope_store_kernel, 1, H=32, K=8, D=128, DP=128, BH=4)
    check(rope_store_kernel, 1, H=32, K=32, D=80, DP=128, BH=4, q_norm=None, k_norm=None)
    check(merge_splits_kernel, 1, ROWS=1920, D=128, DP=128, BM=2, NS=16)
    check(embed_kernel, 8, D=128, SIZE=8192)
    check(embed_kernel, 8, D=128, SIZE=8192, addend=None, addend_rows=None, stride=0)
    check(embed_pair_kernel, 8, D=128, SIZE=8192, NORMED=True)
    check(embed_pair_kernel, 8, D=128, SIZE=8192, NORMED=False, parent_rows=None)
