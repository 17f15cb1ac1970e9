"""Compiling Triton kernels for a named GPU on a machine without one, and what they were compiled to.

Triton makes the same code of the same kernel each time, and takes minutes for all that the tests ask for. So RECORD, a
file in the repository, holds what the tests look at, under a hash of all that decides it. A kernel that is not in the
file is compiled. After a change of kernels, write the file anew; it gets what these tests ask for, and nothing else:

    RECORD_KERNELS=1 python -m pytest tests/ops tests/drafters/test_lookup.py -k "not interpreter"
"""
import ast
import hashlib
import inspect
import itertools
import json
import os
import re
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, NamedTuple

import pytest

SAME_PTX = (80, 86, 89)  # Triton makes the same PTX for them, but for the name of the target: test_the_same_ptx


class Compiled(NamedTuple):
    """What tests ask of a compiled kernel."""
    spilled: int  # bytes of stack a thread: these kernels have no arrays, so all of it is spilled registers
    shared: int  # bytes of shared memory a program
    ptx: str  # of the PTX: what reads and writes global memory, or waits for another kernel, in order
    ttgir: str  # of Triton's GPU code: the buffers, loads and products of a pipeline, in order
    code: str  # a hash of the PTX but for the target's name and what a debugger reads
    loop: int  # instructions of the shortest loop that multiplies matrices, if that was asked for


class Made(NamedTuple):
    """What Triton makes of a kernel."""
    ptx: str
    ttgir: str
    cubin: bytes
    shared: int


RECORD = Path(__file__).parent / "ops/compiled.json"  # what kernels were compiled to, by `key_of`
RECORDING = "RECORD_KERNELS" in os.environ  # write RECORD: what this process asks for, and nothing else
used: dict[str, Compiled] = {}
made_here: dict[tuple, Made] = {}  # by what was compiled, with all its arguments, and card


@cache
def read_record() -> dict[str, Compiled]:
    def unfold(words: str) -> str:
        return re.sub(r"(?m)^(.*) x(\d+)$", lambda m: "\n".join([m[1]] * int(m[2])), words)
    entries = json.loads(RECORD.read_text())["kernels"] if RECORD.exists() else {}
    return {key: Compiled(spilled, shared, unfold(ptx), unfold(ttgir), code, loop)
            for key, (spilled, shared, ptx, ttgir, code, loop) in entries.items()}


def write_record() -> None:
    import triton

    def fold(words: str) -> str:
        runs = [(word, len(list(run))) for word, run in itertools.groupby(words.splitlines())]
        return "\n".join(word if count == 1 else f"{word} x{count}" for word, count in runs)
    lines = [f"{json.dumps(key)}: {json.dumps(found._replace(ptx=fold(found.ptx), ttgir=fold(found.ttgir)))}"
             for key, found in sorted(used.items())]
    RECORD.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n' + ",\n".join(lines) + "\n}}\n")


def compile_ahead(kernel, arch: int, types: Mapping[str, str], constants: Mapping[str, Any], warps: int = 4,
                  stages: int = 3, divisible: Collection[str] = (), loop: bool = False) -> Compiled:
    """Compile a kernel for architecture `arch` (90: sm_90), without a GPU, or look up in RECORD what that gives. A
    kernel that is not in there, because it has changed or Triton is another one, is compiled.

    types: Triton's type of each parameter, such as "*bf16" or "i32"; constants: the values of all constexpr parameters
    and of those that are None, whatever `types` says of them. Pointers are divisible by 16, and so are the integers in
    `divisible`. loop: find Compiled.loop, which takes half a second.
    """
    source, options = source_of(kernel, types, constants, divisible), {"num_warps": warps, "num_stages": stages}
    key = key_of(source, arch, options, loop)
    if key not in used:
        if key not in read_record():
            if not RECORDING:
                warnings.warn(f"{kernel.__name__} is compiled: it is not in {RECORD.name}, see CONTRIBUTING.md",
                              stacklevel=2)
            used[key] = look_at(make(source, arch, options), arch, loop)
        else:
            used[key] = read_record()[key]
        if RECORDING:
            assert "PYTEST_XDIST_WORKER" not in os.environ, "RECORD_KERNELS needs a single process: no -n"
            write_record()
    return used[key]


def source_of(kernel, types: Mapping[str, str], constants: Mapping[str, Any], divisible: Collection[str]):
    """Triton's ASTSource."""
    from triton.compiler import ASTSource
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = [name for name in names if signature[name][0] == "*" or name in divisible]
    return ASTSource(fn=kernel, signature=signature,
                     constexprs={(names.index(name),): value for name, value in constants.items()},
                     attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})


def key_of(source, arch: int, options: Mapping[str, int], loop: bool) -> str:
    """The kernel's name and a hash of all that decides what `look_at` finds. Triton's own key of a kernel is not used:
    it changes with the number of a kernel's first line."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    backend = make_backend(GPUTarget("cuda", arch, 32))
    parsed = vars(backend.parse_options(dict(options))) | {"extern_libs": None}  # paths of libraries that Triton brings
    settings = sorted(get_cache_invalidating_env_vars().items())
    shared = SAME_PTX if arch in SAME_PTX else ()
    finds = [inspect.getsource(function) for function in (look_at, spilled_bytes, loop_length, machine_code, assemble)]
    decides = (triton.__version__, backend.hash(), sorted(parsed.items()), settings, arch, shared, loop, finds,
               sources(source.fn), source.signature, sorted(source.constants.items()), sorted(source.attrs.items()))
    return f"{source.name} {hashlib.sha256(repr(decides).encode()).hexdigest()[:20]}"


@cache
def sources(kernel) -> list[str]:
    """The source of a kernel and of all functions that it calls, and the values that they take from their files."""
    from triton.language.core import constexpr, dtype
    from triton.runtime.jit import JITCallable
    found, functions = [], [kernel]
    for function in functions:
        found.append(repr((function.src, getattr(function, "noinline", None), function.fn.__defaults__)))
        outside = inspect.getclosurevars(function.fn)
        values = function.fn.__globals__ | outside.nonlocals
        names = {node.id for node in ast.walk(ast.parse(function.src)) if isinstance(node, ast.Name)}
        for name in sorted(names & values.keys()):
            value = values[name]
            if isinstance(value, JITCallable):
                functions += [value] if all(value is not other for other in functions) else []
            elif isinstance(value, (constexpr, dtype, int, float, str, NoneType)):
                found.append(f"{name} = {value!r}")
            else:  # Triton's own modules and functions change with its version
                where = value.__name__ if isinstance(value, ModuleType) else value.__module__
                assert where.partition(".")[0] == "triton", f"{kernel.__name__}: what of {name} decides its code?"
    return found


def make(source, arch: int, options: Mapping[str, int]) -> Made:
    """Compile it. Nothing is found in, or left in, the cache in the home folder. What was compiled for one card of
    SAME_PTX is only assembled for the others."""
    import triton
    from triton.backends.compiler import GPUTarget
    wanted = source.fn, str((source.signature, source.constants, source.attrs, options))
    for other in (arch, *(SAME_PTX if arch in SAME_PTX else ())):
        if (wanted, other) in made_here:
            made = made_here[wanted, other]
            return made if other == arch else assemble(made, arch, options)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", folder)
        made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(options))
    made_here[wanted, arch] = Made(made.asm["ptx"], made.asm["ttgir"], made.asm["cubin"], made.metadata.shared)
    return made_here[wanted, arch]


def assemble(made: Made, arch: int, options: Mapping[str, int]) -> Made:
    """The same kernel for another card that gets the same PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    backend = make_backend(GPUTarget("cuda", arch, 32))
    ptx = re.sub(r"(?m)^\.target sm_\d+", f".target sm_{arch}", made.ptx)
    return made._replace(ptx=ptx, cubin=backend.make_cubin(ptx, {}, backend.parse_options(dict(options)), arch))


def look_at(made: Made, arch: int, loop: bool) -> Compiled:
    """What tests ask about."""
    assert f".target sm_{arch}" in made.ptx
    code = re.sub(r"//.*|\.(loc|file)\b.*|\bsm_\d+", "", made.ptx.partition(".section")[0])
    ptx = re.findall(r"\b(?:griddepcontrol|prefetch|cp\.async\.c[ag]|[ls][dt]\.global|[ls][dt]\.local|red\.global|atom)"
                     r"[\w.:]*|\.local\b", code)
    ttgir = re.findall(r"(ttg\.local_alloc :).*( !ttg.memdesc<(?:\d+x)+\w+)|(async_wait ).*(num = \d+)|"
                       r"(ttng\.warp_group_dot)\b|(pendings = \d+)", made.ttgir)
    return Compiled(spilled_bytes(made.cubin), made.shared, "\n".join(ptx), "\n".join(map("".join, ttgir)),
                    hashlib.sha256("".join(code.split()).encode()).hexdigest()[:20],
                    loop_length(made.cubin, arch) if loop else 0)


def spilled_bytes(cubin: bytes) -> int:
    return int(re.search(r"STACK:(\d+)", nvidia_tool("cuobjdump", cubin, "-res-usage"))[1])


def machine_code(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file with one kernel."""
    headers, (size, count) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    [(offset, length)] = [(offset, length) for _, _, flags, _, offset, length in sections if flags & 4]
    return cubin[offset:offset + length]


def loop_length(cubin: bytes, arch: int) -> int:
    """Instructions of the shortest loop that multiplies matrices."""
    code = machine_code(cubin)
    listing = nvidia_tool("nvdisasm", code, "-b", f"SM{arch}")
    instructions = re.findall(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+(.*)", listing)  # of 16 bytes each
    assert len(instructions) == len(code) // 16
    jumps = [(int(m[1], 16) // 16, i) for i, line in enumerate(instructions)
             if (m := re.search(r"BRA.* 0x([0-9a-f]+)", line))]
    loops = [instructions[target:i + 1] for target, i in jumps if target < i]
    return min(len(loop) for loop in loops if any("MMA" in line for line in loop))


def nvidia_tool(name: str, code: bytes, *options: str) -> str:
    """What cuobjdump or nvdisasm, which come with Triton, print about machine code."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, *options, file.name], text=True, capture_output=True, check=True).stdout
