"""Running and compiling Triton kernels on a machine without a GPU.

The interpreter (TRITON_INTERPRET=1) runs a kernel with numpy: it shows wrong numbers, but accepts what the compiler
refuses. Compiling ahead of time for a named GPU (compiled_kernels.py) shows what the compiler refuses, spilled
registers and too much shared memory, but computes nothing. So every kernel meets both. Triton chooses between them when
it is imported: tests marked `interpreted` run in a second pytest process, which conftest's fixture `interpreter`
starts. To see them one by one:

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_linear.py
"""
import math
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compiled_kernels import SAME_PTX, Compiled, compile_ahead

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
SPLITS = 6  # the most whose sums are added up by unrolled code, among the tilings of these shapes
FEW_ROWS, SPLITS_OF_FEW = 16, 16  # the same for up to so many rows


def cards(group: str, archs: Iterable[int] = CARDS) -> list:
    """For pytest.mark.parametrize: these architectures. With --dist loadgroup one worker gets those of SAME_PTX: what
    it compiled for one of them serves the others."""
    return [pytest.param(arch, marks=pytest.mark.xdist_group(f"{group}, same PTX")) if arch in SAME_PTX else arch
            for arch in archs]


def run_interpreted(files: Collection[Path]) -> tuple[str, dict[str, list[str]]]:
    """Run the tests of `files` that are marked `interpreted`, in one pytest process where Triton interprets. Returns
    what it printed and, for each file that it got to, how its tests ended ("PASSED", ...). No file is in there where
    the process was not able to end."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "triton_tools", *map(str, files)]
    # numpy's products are tiny: a second thread only waits for them
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": with_path(ROOT / "tests")}
    done = subprocess.run(command, env=env, cwd=ROOT, text=True, capture_output=True)
    ends = {}
    if done.returncode in (0, 1):
        for file, end in re.findall(r"(?m)^(\S+\.py)::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", done.stdout):
            ends.setdefault(file, []).append(end)
    return done.stdout + done.stderr, ends


def pytest_configure(config: pytest.Config) -> None:
    """In the process of `run_interpreted`: spare Triton's interpreter what takes it three quarters of its time."""
    from triton.language import core
    from triton.runtime import interpreter
    from triton.runtime.interpreter import ReduceOps

    patch_lang, find_dtype, reduce, block_type = (
        interpreter._patch_lang, interpreter._get_np_dtype, ReduceOps.generic_reduce, core.block_type.__init__)
    dtypes, shapes, block_types = {}, {}, {}
    patched = set()

    def patch_lang_once(function: Any) -> SimpleNamespace:
        """At each launch, and each call within a kernel, it replaces what that file sees of triton.language, and then
        puts it back. Nothing here needs what was there."""
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch_lang(function)
        return SimpleNamespace(restore=lambda: None)

    def find_dtype_once(dtype: Any) -> Any:
        """It makes a table of data types at each operation."""
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    def reduce_by_halves(self: Any, blocks: tuple) -> list:
        """It combines the elements of a tl.reduce one by one."""
        if self.axis is None:
            return reduce(self, blocks)
        arrays = [block.handle.data for block in blocks]
        while arrays[0].shape[self.axis] > 1:
            halves = zip(*(np.split(array, 2, self.axis) for array in arrays), strict=True)
            operands = [self.to_tensor(array, block.dtype)
                        for half in halves for array, block in zip(half, blocks, strict=True)]
            made = self.combine_fn.fn(*operands)
            arrays = [tensor.handle.data for tensor in (made if isinstance(made, tuple) else (made,))]
        arrays = arrays if self.keep_dims else [array.squeeze(self.axis) for array in arrays]
        return [self.to_tensor(array, block.dtype) for array, block in zip(arrays, blocks, strict=True)]

    def make_tensor(self: Any, handle: Any, type_: Any) -> None:
        """It wraps each number of each tensor's shape."""
        self.handle, self.type, self.dtype = handle, type_, type_.scalar
        if type_.name not in shapes:
            numbers = tuple(type_.shape) if type_.is_block() else ()
            shapes[type_.name] = core.constexpr(math.prod(numbers)), core.tuple(map(core.constexpr, numbers))
        self.numel, self.shape = shapes[type_.name]

    def make_block_type(self: Any, element: Any, shape: Any) -> None:
        """It checks the shape of each operation's result."""
        key = element.name, tuple(shape)
        if key not in block_types:
            block_type(self, element, shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key])

    interpreter._patch_lang, interpreter._get_np_dtype = patch_lang_once, find_dtype_once
    core.tensor.__init__, core.block_type.__init__ = make_tensor, make_block_type
    ReduceOps.generic_reduce = reduce_by_halves
    # It works out whether integers overflow, in ten operations each, and then drops the result where debug is off.
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


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


def assert_fits(made: Compiled, arch: int, what: object = "", spilled: int = 0) -> None:
    assert made.spilled <= spilled, f"{what} spills {made.spilled} bytes on sm_{arch}"
    assert made.shared <= SHARED[arch], f"{what} wants {made.shared} bytes of shared memory on sm_{arch}"


def largest(found: Iterable[tuple]) -> list[tuple]:
    """Those of the tuples, each with a Tiling, that no other one has a part of: the same but for shorter blocks of
    columns, fewer stages, and one split in place of several. That code needs no more registers and shared memory."""
    groups: dict[tuple, list] = {}
    for item in sorted(found):
        same = tuple((part.BM, part.BN, part.warps) if isinstance(part, Tiling) else part for part in item)
        [size] = [(part.BK, part.stages, part.SK > 1) for part in item if isinstance(part, Tiling)]
        kept = [(other, its) for other, its in groups.get(same, []) if any(a > b for a, b in zip(its, size))]
        inside = any(all(a >= b for a, b in zip(its, size)) for _, its in kept)
        groups[same] = kept if inside else [*kept, (item, size)]
    return [item for kept in groups.values() for item, _ in kept]


def compile_linear(tiling: Tiling, even: bool, arch: int, options: bool, norm: bool, dtype: str = "bf16",
                   heads: bool = False, planes: int = 0, group: int = 0, zeros: bool = False,
                   loop: bool = False) -> Compiled:
    """Compile ops.linear.linear_kernel. even: BK divides K. planes, group: see ops.quantized.Quantized (0: no
    integers). zeros: scales and zeros are fp16.

    options: with a bias, gated and, without a norm, with a residual: what is normed is never what is added to it. Any
    number of splits but one is compiled as the most, so that cards with other numbers share the code.
    """
    splits = SPLITS_OF_FEW if tiling.BM <= FEW_ROWS else SPLITS
    assert tiling.SK <= splits or tiling.BM > 64
    direct = planes > 0 and tiling.BM == 1  # one row of x, which the kernel makes integers of
    constants = {"BM": tiling.BM, "BN": tiling.BN, "BK": tiling.BK, "SK": splits if tiling.SK > 1 else 1,
                 "STAGES": tiling.stages, "AHEAD": tiling.ahead if arch >= 90 else 0, "UNROLL": tiling.unroll,
                 "PDL": arch >= 90, "EVEN_K": even, "GATED": options and not heads, "D": 128 if heads else 2,
                 "KV_HEADS": 8 if heads else 0, "PLANES": 0 if direct else planes, "GROUP": group,
                 "GROUPS": 8192 // group if group else 0, "ZEROS": zeros, "INTERPRET": False}
    absent = [] if group and not direct else ["sums_ptr"]
    absent += [] if planes and not direct else ["x_scale_ptr"]
    absent += [] if planes else ["w_scale_ptr"]
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
        types |= {"w_ptr": "*i8"} if direct else {"x_ptr": "*i8", "w_ptr": "*i8"}
    return compile_ahead(linear_kernel, arch, types, constants | dict.fromkeys(absent), tiling.warps,
                         divisible=("width", "K", "columns"), loop=loop)
