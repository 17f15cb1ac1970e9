"""kernels.py through Triton's compiler, without a GPU: every config that attention_config gives compiles for every
architecture, fits its shared memory and spills no register. The numbers are test_kernels.py's; speed needs a GPU.
"""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from ops import attention as attention_module
from ops import embed_rope

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: nothing compiles", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED = {86: 101376, 89: 101376, 90: 232448}  # bytes a program may use
SMS = {86: (82, 84), 89: (76, 128), 90: (114, 132)}  # 3090, A40; 4080, 4090; H100 PCIe, SXM
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LLAMA2, LLAMA3, SMOL, QWEN = (32, 32, 128), (32, 8, 128), (9, 3, 64), (28, 4, 128)  # H, K, D
ODD = (32, 32, 80)
CASES = [  # T, (H, K, D), words of bits, dtype
    (1, LLAMA2, 0, "bf16"), (7, LLAMA2, 0, "bf16"), (10, LLAMA2, 1, "bf16"), (60, LLAMA2, 1, "bf16"),
    (60, LLAMA2, 2, "bf16"), (512, LLAMA2, 0, "bf16"), (7, LLAMA3, 0, "bf16"), (60, LLAMA3, 1, "bf16"),
    (10, SMOL, 1, "bf16"), (60, SMOL, 1, "bf16"), (512, SMOL, 0, "bf16"), (60, QWEN, 1, "bf16"), (60, ODD, 1, "bf16"),
    (10, LLAMA2, 1, "fp32"), (60, LLAMA2, 1, "fp32")]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Compile afresh: nothing found in, nothing left in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel, arch: int, warps: int, stages: int, types: dict[str, str], **constants) -> str:
    """The PTX, after the checks. types: of the arguments that are not constants; pointers are 16-byte aligned."""
    names = kernel.arg_names
    types = {name: t for name, t in types.items() if name not in constants}
    aligned = [name for name, t in types.items() if t[0] == "*"]
    source = ASTSource(fn=kernel, signature={name: types.get(name, "constexpr") for name in names},
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": stages})
    assert out.metadata.shared <= SHARED[arch]
    assert spilled(out.asm["cubin"]) == 0
    return out.asm["ptx"]


def spilled(cubin: bytes) -> int:
    """Bytes of stack a thread: these kernels have no arrays, so whatever is there is spilled registers."""
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


def attention(arch: int, T: int, shape: tuple[int, int, int], words: int, dtype: str, sms: int,
              pdl: bool = False) -> str:
    H, K, D = shape
    BM, BN, NS, warps, stages = attention_module.attention_config(T, H // K, K, D, DTYPES[dtype], sms, divmod(arch, 10))
    unused = ([] if NS > 1 else ["parts", "logs"]) + ([] if words else ["bits"])
    types = {"q": f"*{dtype}", "kv": f"*{dtype}", "base": "*i64", "bits": "*i64", "out": f"*{dtype}", "parts": "*fp32",
             "logs": "*fp32", "S": "i32"}
    kernel = attention_module.attention_kernel
    return compiled(kernel, arch, warps, stages, types, **dict.fromkeys(unused), T=T, H=H, K=K, D=D,
                    DP=triton.next_power_of_2(D), WORDS=words, BM=BM, BN=BN, NS=NS, PDL=pdl)


@pytest.mark.parametrize("arch", [86, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(arch, case):
    """Keys and values come 16 bytes at a time, to shared memory ahead of their use."""
    assert "cp.async.cg.shared.global" in attention(arch, *case, SMS[arch][1])


@pytest.mark.parametrize("T", [1, 60])
def test_attention_sm89(T):
    """Its code is that of sm_86, as a rule."""
    attention(89, T, LLAMA2, int(T > 1), "bf16", 128)


def test_dependent_launch_is_in_the_code_only_where_asked_for():
    """sm_86 has no such instruction."""
    assert "griddepcontrol" not in attention(90, 10, LLAMA2, 1, "bf16", 132)
    ptx = attention(90, 10, LLAMA2, 1, "bf16", 132, pdl=True)
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


def test_no_other_config_is_ever_returned():
    """Whatever the heads, the number of rows and the GPU, tiles and stages are among those compiled above."""
    def tile(T, H, K, D, dtype, sms, capability):
        BM, BN, NS, warps, stages = attention_module.attention_config(T, H // K, K, D, DTYPES[dtype], sms, capability)
        assert 1 <= NS <= 8
        return dtype, BM, BN, warps, stages
    for arch in SHARED:
        capability = divmod(arch, 10)
        tested = {tile(T, *shape, dtype, SMS[arch][1], capability) for T, shape, _, dtype in CASES}
        for T in (*range(1, 65), 128, 512):
            for shape in (LLAMA2, LLAMA3, SMOL, QWEN, ODD, (64, 8, 128), (40, 40, 128), (71, 1, 64)):
                for sms in SMS[arch]:
                    for dtype in ("bf16", "fp32"):
                        assert tile(T, *shape, dtype, sms, capability) in tested
    assert attention_module.attention_config(512, 1, 32, 128, torch.bfloat16, 132, (9, 0))[2] == 1  # written at once


@pytest.mark.parametrize("arch", [86, 90])
def test_the_other_kernels(arch):
    types = {"cache_pos": "*i64", "eps": "fp32", "S": "i32", "parts": "*fp32", "logs": "*fp32", "tokens": "*i64",
             "places": "*i64", "rows": "*i64", "onward": "*fp32", **dict.fromkeys(("stride", "C", "T"), "i32")}

    def check(kernel, warps: int, **constants) -> None:
        """All other arguments point to bf16."""
        arguments = {name: types.get(name, "*bf16") for name in kernel.arg_names}
        compiled(kernel, arch, warps, 3, arguments, PDL=False, **constants)

    check(embed_rope.rope_store_kernel, 1, H=32, K=8, D=128, DP=128, BH=4)
    check(embed_rope.rope_store_kernel, 1, H=32, K=32, D=80, DP=128, BH=4, q_norm=None, k_norm=None)
    check(attention_module.merge_kernel, 1, ROWS=1920, D=128, DP=128, BM=2, NS=16)
    check(embed_rope.embed_kernel, 8, D=128, SIZE=8192)
    check(embed_rope.embed_kernel, 8, D=128, SIZE=8192, onward=None, rows=None, stride=0)
