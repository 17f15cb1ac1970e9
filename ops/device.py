"""What a device can do, and how kernels are launched on it."""
import os
import resource
import textwrap
import warnings
from collections.abc import Callable
from functools import cache, wraps
from types import SimpleNamespace

import torch
from torch import Tensor

from ops.startup import part


def has_cuda() -> bool:
    with warnings.catch_warnings():  # torch warns of an old driver, which `gpu_problem` names
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


try:
    # Without a GPU no kernel is launched, and PyTorch for CPUs brings no Triton. Tests set the variable.
    if not has_cuda() and "TRITON_INTERPRET" not in os.environ:
        raise ImportError("there is no GPU")
    import triton
    import triton.language as tl
    TRITON_ERROR = None
except Exception as error:  # a broken one raises anything
    TRITON_ERROR = error
    triton = SimpleNamespace(jit=lambda f=None, **_: f or (lambda f: f))  # files with kernels are imported all the same
    tl = SimpleNamespace(constexpr=None)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter can neither multiply bf16 nor run assembly


@cache
def device_limits(device: torch.device) -> tuple[int, tuple[int, int]]:
    """The number of multiprocessors and the compute capability that tilings are chosen for. On a CPU (Triton's
    interpreter): those of a small Ampere card. Desktop Blackwell (sm_120, sm_121) has as little shared memory as Ada:
    it gets Ada's tilings, and no dependent launch."""
    if device.type != "cuda":
        return 82, (8, 6)
    props = torch.cuda.get_device_properties(device)
    return props.multi_processor_count, (8, 9) if props.major == 12 else (props.major, props.minor)


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
def start_next(PDL: tl.constexpr):
    """Let the next kernel start: the first half of `wait_for_previous`, for kernels that do something before the second
    half. (To do both twice is harmless.)"""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Let the next kernel start, then wait until everything that the previous kernel wrote is visible. Without PDL,
    nothing: kernels then run one after another."""
    start_next(PDL)
    if PDL:
        tl.extra.cuda.gdc_wait()


# ----- Can this GPU run the kernels? ----------------------------------------------------------------------------------

CAPABILITY = (8, 0)  # Ampere: attention takes 70 KB of shared memory and more, and Turing has 64
WITHOUT = "; --device cpu works without it"


@part("GPU")
def gpu_problem(device: str | None) -> str | None:
    """One line that says why `device` ("cuda", "cpu"; None: the GPU if there is one) cannot be used; None if it can."""
    if device not in ("cuda", None):
        return None
    if not has_cuda():
        reason = why_no_cuda()
        if device is None and "driver on your system is too old" not in reason:
            return None
        return f"{'--device cuda: ' if device else ''}torch can use no GPU here ({reason}){WITHOUT}"
    if torch.version.hip:
        return f"the kernels are for NVIDIA's GPUs, and this PyTorch is for AMD's{WITHOUT}"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < CAPABILITY:
        return (f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and the kernels need "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} (Ampere) or later{WITHOUT}")
    problem = triton_problem()
    return problem and f"{problem}: install a C compiler, and the Triton of PyTorch {torch.__version__}{WITHOUT}"


def why_no_cuda() -> str:
    """What torch says about it, without its advice."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this PyTorch is built for CPUs only"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition(". Please")[0].partition("\n")[0]
    return "torch.cuda.is_available() is false"


@triton.jit
def probe_kernel(out, PDL: tl.constexpr):
    wait_for_previous(PDL)
    lane = tl.arange(0, 32)
    tl.store(out + lane, tl.gather(lane, lane, 0))


@cache
def triton_problem() -> str | None:
    """Why Triton cannot compile and launch a kernel: it is missing, broken, too old, or finds no C compiler."""
    if TRITON_ERROR:
        return f"Triton, which the kernels need on a GPU, cannot be imported ({one_line(TRITON_ERROR)})"
    out = torch.zeros(32, dtype=torch.int32, device="cuda")
    try:
        probe_kernel[1,](out, **pdl_options(out.device))
    except Exception as error:
        return f"Triton {triton.__version__} cannot compile a kernel here ({one_line(error)})"
    return None


def one_line(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 250)


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
