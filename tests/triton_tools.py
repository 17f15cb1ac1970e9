"""Running and compiling Triton kernels on a machine without a GPU.

The interpreter (TRITON_INTERPRET=1) runs a kernel with numpy: it shows wrong numbers, but accepts what the compiler
refuses. Compiling ahead of time for a named GPU shows what the compiler refuses, spilled registers and too much shared
memory, but computes nothing. So every kernel meets both. Triton chooses between them when it is imported: tests marked
`interpreted` run in a second pytest process, which `run_interpreted` starts. To see them one by one:

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_linear.py
"""
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ops.linear import linear_kernel
from ops.tiling import Tiling

ROOT = Path(__file__).resolve().parent.parent
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="runs in the interpreter: see test_in_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRET, reason="not in the interpreter's process")

CARDS = {80: 108, 86: 82, 89: 128, 90: 132}  # architecture: multiprocessors of A100, RTX 3090, RTX 4090, H100 SXM
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448}  # bytes of shared memory that a program may use

ROWS = (1, 2, 7, 10, 16, 33, 60, 64)
SHAPES = {  # [N, K] of wqkv, wo, w13, w2, lm_head (and EAGLE's fc)
    "7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096), (4096, 8192)],
    "13B": [(15360, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "SmolLM2": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
}


def run_interpreted(file: str) -> None:
    """Run the tests of `file` that are marked `interpreted`, in a pytest process where Triton interprets."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "triton_tools", file]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": with_path(ROOT / "tests")}
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
    passed = done.returncode == 0 and "skipped" not in done.stdout.splitlines()[-1]
    assert passed, done.stdout[-8000:] + done.stderr[-4000:]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the process of `run_interpreted`, which loads this file as a plugin: drop all tests but the interpreted."""
    items[:] = [item for item in items if interpreted.mark in item.iter_markers()]


def with_path(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def run_without_triton(code: str) -> str:
    """Run Python code in a process where Triton cannot be imported, and return what it prints."""
    code = "import sys; sys.modules['triton'] = None\n" + code
    env = os.environ | {"PYTHONPATH": with_path(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


class Compiled(NamedTuple):
    ptx: str
    ttgir: str
    cubin: bytes
    spilled: int  # bytes of stack a thread: these kernels have no arrays, so all of it is spilled registers
    shared: int  # bytes of shared memory a program


def compile_ahead(kernel, arch: int, types: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4,
                  stages: int = 3, divisible: Collection[str] = ()) -> Compiled:
    """Compile a kernel for architecture `arch` (90: sm_90), without a GPU.

    types: Triton's type of each parameter, such as "*bf16" or "i32"; constants: the values of all constexpr parameters
    and of those that are None, whatever `types` says of them. Pointers are divisible by 16, and so are the integers in
    `divisible`. Nothing is found in, or left in, the cache in the home folder.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in divisible]
    source = ASTSource(fn=kernel, signature=signature,
                       constexprs={(names.index(name),): value for name, value in constants.items()},
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options={"num_warps": warps, "num_stages": stages})
        usage = nvidia_tool("cuobjdump", "-res-usage", made.asm["cubin"], folder)
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    return Compiled(made.asm["ptx"], made.asm["ttgir"], made.asm["cubin"], spilled, made.metadata.shared)


def nvidia_tool(name: str, option: str, cubin: bytes, folder: str) -> str:
    """What cuobjdump or nvdisasm, which come with Triton, print about machine code."""
    import triton
    file = Path(folder) / "kernel.cubin"
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, option, file], text=True, capture_output=True, check=True).stdout


def assert_fits(made: Compiled, arch: int, what: object = "", spilled: int = 0) -> None:
    assert made.spilled <= spilled, f"{what} spills {made.spilled} bytes on sm_{arch}"
    assert made.shared <= SHARED[arch], f"{what} wants {made.shared} bytes of shared memory on sm_{arch}"


def compile_linear(tiling: Tiling, even: bool, arch: int, options: bool, norm: bool, dtype: str = "bf16",
                   heads: bool = False, planes: int = 0, group: int = 0) -> Compiled:
    """Compile ops.linear.linear_kernel. even: BK divides K. planes, group: see ops.quantized.Quantized (0: no integers)

    options: with a bias, gated and, without a norm, with a residual: what is normed is never what is added to it.
    """
    constants = {"BM": tiling.BM, "BN": tiling.BN, "BK": tiling.BK, "SK": tiling.SK, "STAGES": tiling.stages,
                 "AHEAD": tiling.ahead, "PDL": arch >= 90, "EVEN_K": even, "GATED": options and not heads,
                 "D": 128 if heads else 2, "KV_HEADS": 8 if heads else 0, "PLANES": planes, "GROUP": group,
                 "GROUPS": 128 if group else 0, "INTERPRET": False}
    absent = [] if group else ["sums_ptr"]
    absent += [] if planes else ["x_scale_ptr", "w_scale_ptr"]
    absent += [] if norm else ["norm_ptr"]
    absent += [] if options else ["bias_ptr"]
    absent += [] if options and not norm and not heads else ["res_ptr"]
    absent += [] if tiling.SK > 1 else ["partial_ptr", "count_ptr"]
    absent += [] if heads else ["rope_ptr", "slot_ptr", "kv_ptr"]
    types = dict.fromkeys(linear_kernel.arg_names, "*" + dtype)
    types |= dict.fromkeys(("M", "width", "K", "S", "columns"), "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("partial_ptr", "x_scale_ptr", "sums_ptr"), "*fp32")
    types |= {"count_ptr": "*i32", "slot_ptr": "*i64", "w_scale_ptr": "*i32" if group else "*fp32"}
    if planes:
        types |= {"x_ptr": "*i8", "w_ptr": "*i8"}
    return compile_ahead(linear_kernel, arch, types, constants | dict.fromkeys(absent), tiling.warps,
                         divisible=("width", "K", "columns"))
