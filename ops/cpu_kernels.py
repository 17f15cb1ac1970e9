"""Decoding's kernels for a CPU, compiled from cpu_kernels.cpp when they are first needed, for this very CPU.

In PyTorch, a decoding step on a CPU is about a thousand small operations, which cost more than the matrix products.
Here a fused linear layer is one call, as on a GPU, and so is attention. Compiling takes a few seconds; the result is
kept in $XDG_CACHE_HOME/eagle2, by default ~/.cache/eagle2. Without a compiler, PyTorch is used, several times slower.

The results of a row do not depend on the other rows, nor on the threads, to the bit: with quantised weights and fp32
activations, verification chooses exactly what plain decoding does.
"""
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from formats.writing import replace_when_whole
from ops.quantized import Quantized, to_tiles

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread")
MAX_THREADS = 16  # then memory is the limit: a guess, since this was measured with 1 and 2
HEAD_SIZES = range(32, 257, 32)
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@cache
def library() -> ctypes.CDLL | None:
    """The kernels; None where they cannot be compiled, of which a line on stderr tells."""
    try:
        lib = ctypes.CDLL(str(compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error) or repr(error)).strip().splitlines()
        said = next((line for line in lines if "error" in line), lines[0])
        print(f"slower than it could be: there are no compiled kernels for this CPU ({said}); they need g++ 11 or "
              "later, and are kept in ~/.cache/eagle2", file=sys.stderr)
        return None
    lib.linear.argtypes = (INT, INT, INT, POINTER, POINTER, FLOAT, ctypes.c_int, POINTER, POINTER, INT, INT,
                           ctypes.c_int, POINTER, POINTER, ctypes.c_int, POINTER, POINTER, POINTER, INT, INT, INT,
                           POINTER)
    lib.attention.argtypes = (INT, INT, INT, INT, INT, POINTER, POINTER, ctypes.c_int, POINTER, POINTER, INT, INT,
                              POINTER)
    lib.rope_store.argtypes = (INT, INT, POINTER, POINTER, POINTER, POINTER, INT, INT, INT, POINTER)
    lib.rms_norm.argtypes = (INT, INT, POINTER, POINTER, FLOAT, POINTER)
    lib.linear.restype = lib.attention.restype = lib.rope_store.restype = lib.rms_norm.restype = None
    lib.set_threads(min(torch.get_num_threads(), MAX_THREADS))
    return lib


def compiled() -> Path:
    """The file of the compiled kernels, made where it is missing. OSError or CalledProcessError where that fails."""
    names = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))]
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("cpu_*.h")))]
    key = hashlib.sha256(repr((sources, FLAGS, compiler, cpu[:1])).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "eagle2")
    file = folder / f"cpu-{key}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replace_when_whole(file) as part:
            subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(part)], check=True, capture_output=True, text=True)
    return file


def takes_linear(x: Tensor, weight: object, *others: Tensor | None) -> bool:
    """Whether `linear` takes these: weights that `takes_weight` does, and fp32 for everything else."""
    return (all(other is None or other.dtype == torch.float32 for other in others) and takes_rows(x)
            and takes_weight(weight))


def takes_weight(weight: object) -> bool:
    """Whether `linear` takes this weight: int8 or int4, of sizes that vectors divide."""
    return (type(weight) is Quantized and weight.shape[0] % 64 == weight.shape[1] % 16 == 0 and library() is not None)


def takes_heads(kv: Tensor) -> bool:
    """Whether `linear` stores keys and values in this cache too."""
    return kv.shape[-1] in HEAD_SIZES and kv.dtype == torch.float32


def takes_rows(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether the kernels take rows x [..., K]: fp32, or of one of these dtypes, K a multiple of 16, and no gradients
    wanted."""
    return (x.dtype in (torch.float32, *dtypes) and x.device.type == "cpu" and x.shape[-1] % 16 == 0
            and not torch.is_grad_enabled() and library() is not None)


def takes_attention(q: Tensor) -> bool:
    """Whether `attention` takes these queries."""
    return takes_rows(q, torch.bfloat16)


def linear(x: Tensor, weight: Quantized, bias: Tensor | None = None, norm: tuple[Tensor, float] | None = None,
           residual: Tensor | None = None, gated: bool = False, rope_cache: tuple[Tensor, Tensor, Tensor] | None = None
           ) -> Tensor:
    """`linear` of ops/linear.py by the kernel, which rounds x to 14 bits, for int4 to 16."""
    N, columns = weight.shape
    norm_weight, eps = norm or (None, 0.0)
    if weight.order is not None:
        x, norm_weight = x[..., weight.order], None if norm is None else norm_weight[weight.order]
    x, scale = x.contiguous(), weight.scale.contiguous()
    K = x.shape[-1]
    T = x.numel() // K
    rope, slots, kv = rope_cache or (None, None, None)
    kv_heads, S, D = kv.shape[1:] if rope_cache else (0, 0, 0)
    out = x.new_empty(*x.shape[:-1], N // 2 if gated else N - 2 * kv_heads * D)
    residual = None if residual is None else residual.contiguous()
    slots = None if slots is None else slots.contiguous()
    library().linear(T, K, N, x.data_ptr(), address(norm_weight), eps, weight.rotated,
                     to_tiles(weight).data_ptr(), scale.data_ptr(), weight.group, columns,
                     scale.dtype == torch.float16, address(bias), address(residual), gated, address(rope),
                     address(slots), address(kv), S, D, kv_heads, out.data_ptr())
    return out


def attention(q: Tensor, kv: Tensor, base: Tensor, bits: Tensor | None = None, window: int | None = None,
              settled: bool = False) -> Tensor:
    """`tree_attention` of ops/attention.py by the kernel, in fp32. q, kv: fp32 or bf16. The result has q's dtype."""
    T, H, D = q.shape
    K, S = kv.shape[1:3]
    out = q.new_empty(T, H * D, dtype=torch.float32)
    rows = q.float().contiguous()
    bits = None if bits is None else bits.contiguous()
    library().attention(T, H, K, S, D, rows.data_ptr(), kv.data_ptr(), kv.dtype == torch.bfloat16, base.data_ptr(),
                        address(bits), 0 if bits is None else bits.shape[1], window or 0, out.data_ptr())
    return out.to(q.dtype)


def rope_store(qkv: Tensor, rope: Tensor, slots: Tensor, kv: Tensor) -> Tensor:
    """`rope_store` of ops/embed_rope.py by the kernel, without norms."""
    T, N = qkv.shape
    K, S, D = kv.shape[1:]
    out = qkv.new_empty(T, N // D - 2 * K, D)
    qkv = qkv.contiguous()  # a name of its own: its memory must live until the kernel has read it
    slots = slots.contiguous()
    library().rope_store(T, N, qkv.data_ptr(), rope.data_ptr(), slots.data_ptr(), kv.data_ptr(), S, D, K,
                         out.data_ptr())
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """F.rms_norm of x [..., K] by the kernel."""
    x = x.contiguous()
    out = torch.empty_like(x)
    library().rms_norm(x.numel() // x.shape[-1], x.shape[-1], x.data_ptr(), weight.data_ptr(), eps, out.data_ptr())
    return out


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
