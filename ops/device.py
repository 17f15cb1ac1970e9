"""What a device can do, and how kernels are launched on it."""
import os
import resource
from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs brings no Triton: kernels are never launched there, but their files are imported
    triton = SimpleNamespace(jit=lambda f=None, **_: f or (lambda f: f))
    tl = SimpleNamespace(constexpr=None)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter multiplies no bf16 and runs no assembly


@cache
def device_limits(device: torch.device) -> tuple[int, tuple[int, int]]:
    """Multiprocessors and compute capability; on a CPU (the Triton interpreter) those of a small Ampere card."""
    if device.type != "cuda":
        return 82, (8, 6)
    props = torch.cuda.get_device_properties(device)
    return props.multi_processor_count, (props.major, props.minor)


def either(on_gpu: Callable, twin: Callable) -> Callable:
    @wraps(twin)
    def function(x: Tensor, *args, **kwargs):
        return (on_gpu if x.is_cuda else twin)(x, *args, **kwargs)
    return function


@triton.jit
def enter(PDL: tl.constexpr):
    """With PDL (programmatic dependent launch, from Hopper on): from here on the next kernel may start, and what the
    kernel before wrote is there."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")


def peak_gb(device: torch.device) -> float:
    """The most that was in use: on a GPU by tensors, since the last reset; else by the process."""
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9
