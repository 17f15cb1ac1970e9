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
except ImportError:  # PyTorch for CPUs brings no Triton. Files with kernels are imported there, kernels never launched
    triton = SimpleNamespace(jit=lambda f=None, **_: f or (lambda f: f))
    tl = SimpleNamespace(constexpr=None)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter can neither multiply bf16 nor run assembly


@cache
def device_limits(device: torch.device) -> tuple[int, tuple[int, int]]:
    """The number of multiprocessors and the compute capability. On a CPU (Triton's interpreter): those of a small
    Ampere card."""
    if device.type != "cuda":
        return 82, (8, 6)
    props = torch.cuda.get_device_properties(device)
    return props.multi_processor_count, (props.major, props.minor)


def by_device(kernel: Callable, twin: Callable) -> Callable:
    """A function that calls `kernel` where its first argument is a CUDA tensor, else `twin`."""
    @wraps(twin)
    def function(x: Tensor, *args, **kwargs):
        return (kernel if x.is_cuda else twin)(x, *args, **kwargs)
    return function


# ----- Programmatic dependent launch ---------------------------------------------------------------------------------
# PDL, from Hopper (sm_90) on: a kernel may start while the previous one still runs. The launch asks for it, and the
# kernel has to wait before it touches anything that the previous kernel reads or writes.


def pdl_options(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch: the kernel's constant PDL and Triton's option launch_pdl, both true where the device can
    overlap kernels."""
    return dict.fromkeys(("PDL", "launch_pdl"), device_limits(device)[1] >= (9, 0))


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel start, then wait until everything that the previous kernel wrote is visible. Without PDL,
    nothing: kernels then run one after another."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# ----- For reports ---------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def peak_gb(device: torch.device) -> float:
    """The most memory in use so far, in GB: on a GPU by tensors, since the last reset; on a CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9
