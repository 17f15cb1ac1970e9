"""Running and compiling Triton kernels without a GPU: the interpreter, and ahead of time for named GPUs."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ops import linear as linear_module
from ops.linear import Tiling as Config

HERE = Path(__file__).resolve().parent
ROWS = (1, 2, 7, 10, 16, 33, 60, 64)
SHAPES = {  # [N, K] of wqkv, wo, w13, w2, lm_head (and EAGLE's fc)
    "7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (4096, 8192)],
    "13B": [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "SmolLM2": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
}
CARDS = {(8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132}  # capability: multiprocessors
LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes of shared memory a program may have


def in_child(call: str, interpret: bool, file: str) -> str:
    """Run functions of a test file in a process of its own. A failed assertion there is one here."""
    pytest.importorskip("triton")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE, Path(file).parent)))}
    env["TRITON_INTERPRET"] = str(int(interpret))
    child = subprocess.run([sys.executable, "-c", f"from {Path(file).stem} import *; {call}"], text=True,
                           capture_output=True, env=env)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return child.stdout


def compile_kernel(config: Config, even: bool, cap: int, options: bool, norm: bool, dtype: str = "bf16",
                   heads: bool = False, planes: int = 0, group: int = 0) -> tuple:
    """-> (PTX, TTGIR, bytes spilt, bytes of shared memory, cubin). planes, group: see qlinears.Quantized.

    options: bias, gated and, without a norm, a residual: what is normed is never what is added to it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names, pdl = linear_module.linear_kernel.arg_names, cap >= 90
    fixed = {k: v for k, v in zip(("BM", "BN", "BK", "SK"), config)} | {
        "GATED": options and not heads, "D": 128 if heads else 2, "KV_HEADS": 8 if heads else 0, "EVEN_K": even,
        "STAGES": config.stages, "AHEAD": config.ahead, "PDL": pdl, "PLANES": planes, "GROUP": group,
        "GROUPS": 128 if group else 0, "INTERPRET": False}
    fixed |= {} if group else {"sums_ptr": None}
    fixed |= {} if planes else dict.fromkeys(("x_scale_ptr", "w_scale_ptr"))
    fixed |= {} if norm else {"norm_ptr": None}
    fixed |= {} if options else {"bias_ptr": None}
    fixed |= {} if options and not norm and not heads else {"res_ptr": None}
    fixed |= {} if config.SK > 1 else dict.fromkeys(("partial_ptr", "count_ptr"))
    fixed |= {} if heads else dict.fromkeys(("rope_ptr", "slot_ptr", "kv_ptr"))
    types = {"M": "i32", "width": "i32", "K": "i32", "S": "i32", "eps": "fp32", "partial_ptr": "*fp32",
             "count_ptr": "*i32", "slot_ptr": "*i64", "columns": "i32", "x_scale_ptr": "*fp32", "sums_ptr": "*fp32",
             "w_scale_ptr": "*i32" if group else "*fp32"} | ({"x_ptr": "*i8", "w_ptr": "*i8"} if planes else {})
    signature = {n: "constexpr" if n in fixed else types.get(n, "*" + dtype) for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names)
               if signature[n][0] == "*" or n in ("width", "K", "columns")}
    source = ASTSource(fn=linear_module.linear_kernel, signature=signature, attrs=aligned,
                       constexprs={(names.index(k),): v for k, v in fixed.items()})
    kernel = triton.compile(source, target=GPUTarget("cuda", cap, 32), options={"num_warps": config.warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return kernel.asm["ptx"], kernel.asm["ttgir"], stack, kernel.metadata.shared, kernel.asm["cubin"]
