"""tests/ops/compiled.json, what kernels were compiled to (tests/compiled_kernels.py): it must not hide a change."""
import importlib.util
import json
from pathlib import Path

import compiled_kernels
import pytest
from triton_tools import compile_linear, not_interpreted

from ops.tiling import Tiling

triton = pytest.importorskip("triton")
pytestmark = not_interpreted

KERNEL = """
import triton
import triton.language as tl

STEP = tl.constexpr(3)

@triton.jit
def inner(x):
    return x + STEP

@triton.jit
def outer(x, TWICE: tl.constexpr = 2):
    return inner(x) * TWICE

@triton.jit
def small_kernel(out, N: tl.constexpr):
    lane = tl.arange(0, N)
    tl.store(out + lane, outer(lane))
"""


def key(folder: Path, source: str = KERNEL, arch: int = 86, warps: int = 4, N: int = 32, type_: str = "*i32",
        loop: bool = False) -> str:
    path = folder / f"made{len(list(folder.iterdir()))}.py"  # Python remembers the lines of a file by its name
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = compiled_kernels.source_of(module.small_kernel, {"out": type_}, {"N": N}, ())
    return compiled_kernels.key_of(made, arch, {"num_warps": warps}, loop)


def test_a_change_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if what was recorded of a kernel is still taken for it after a change of its source, of a function that it
    calls, directly or not, of a value that one of them takes from its file, or of anything else that decides what is
    compiled; or if it is forgotten after a change of other lines."""
    first = key(tmp_path)
    assert key(tmp_path) == first == key(tmp_path, "# a comment\n" + KERNEL + "\nOTHER = 5\n")
    others = [key(tmp_path, KERNEL.replace(old, new)) for old, new in (
        ("x + STEP", "x - STEP"), ("inner(x) *", "inner(x) +"), ("outer(lane)", "outer(lane + 1)"),
        ("constexpr(3)", "constexpr(4)"), ("constexpr = 2", "constexpr = 3"), ("@triton.jit\ndef inner",
                                                                              "@triton.jit(noinline=True)\ndef inner"))]
    others += [key(tmp_path, **change) for change in ({"arch": 89}, {"arch": 90}, {"warps": 8}, {"N": 64},
                                                      {"type_": "*i64"}, {"loop": True})]
    monkeypatch.setattr(triton, "__version__", "0.1")
    others.append(key(tmp_path))
    assert len({first, *others}) == 1 + len(others)


def test_what_decides_unseen_is_refused(tmp_path: Path) -> None:
    """Fails if a kernel may use something of its file that the key does not cover."""
    with pytest.raises(AssertionError, match="what of STEP decides its code"):
        key(tmp_path, KERNEL.replace("STEP = tl.constexpr(3)", "class STEP:\n    value = 3"))


@pytest.mark.slow
def test_the_record_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if this Triton makes other code of a kernel than the one that wrote the record and says to be the same, if
    the record was not written anew after a change of that kernel, or if a kernel that is not in it is not compiled."""
    recorded = json.loads(compiled_kernels.RECORD.read_text())["triton"]
    if triton.__version__ != recorded:
        pytest.skip(f"the record is of Triton {recorded}: all kernels are compiled")

    def ask() -> compiled_kernels.Compiled:
        return compile_linear(Tiling(16, 64, 128, 4, 4, 4), False, 86, options=False, norm=False, dtype="fp16")

    wanted = ask()
    assert wanted in compiled_kernels.read_record().values(), "write the record anew: see CONTRIBUTING.md"
    monkeypatch.setattr(compiled_kernels, "read_record", dict)
    monkeypatch.setattr(compiled_kernels, "RECORDING", False)
    for name in ("used", "made_here"):
        monkeypatch.setattr(compiled_kernels, name, {})
    with pytest.warns(UserWarning, match="linear_kernel is compiled"):
        assert ask() == wanted
