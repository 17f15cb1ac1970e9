"""Compiling kernels before they are needed, all at once.

Triton compiles a kernel at its first launch. The program waits for that, half a second to some seconds. A cycle
launches some fifty different kernels. So they are collected first, by running what launches them without launching
anything, and then compiled together: the compiler spends most of its time outside of Python's lock.
"""
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ops.device import triton
from ops.startup import part


@part("kernels")
@torch.inference_mode()
def compile_kernels(*jobs: Callable[[], object]) -> None:
    """Compile, or take from Triton's cache, and load all kernels that the jobs launch. Everything else that a job does
    is done, on zeros where kernels should have written something."""
    with without_launches() as calls, Zeros():
        for job in jobs:
            job()
    with Loader(os.cpu_count()) as loader:
        # With ignore_errors=False, a failed kernel would leave the mode switched on. The futures below raise the error.
        with triton.AsyncCompileMode(loader, ignore_errors=True):
            for kernel, args, options in calls:
                kernel.run(*args, grid=None, warmup=True, **dict(options))
    for future in loader.futures:
        future.result()


class Loader(ThreadPoolExecutor):
    """Loads each kernel where it was compiled.

    Triton 3.6 compiles a C module to launch a kernel, the same one for all kernels of a signature. Two threads may not
    do that together: if one replaces the file while Python opens it for the other, Python remembers the module under an
    inode that is free again, and takes it later for another signature's.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.futures: list[Future] = []
        self.loading: dict[tuple, Lock] = defaultdict(Lock)  # of each signature

    def submit(self, compile_one: Callable[[], object]) -> Future:
        def load() -> object:
            kernel = compile_one()
            with self.loading[tuple(kernel.src.signature.values())]:
                kernel.run  # noqa: B018  (reading this property loads it)
            return kernel

        self.futures.append(super().submit(load))
        return self.futures[-1]


@dataclass(frozen=True)
class Pointer:
    """A tensor, as far as Triton's compiler looks at it, without its memory."""
    dtype: torch.dtype
    address: int  # modulo 16

    def data_ptr(self) -> int:
        return self.address


@contextmanager
def without_launches() -> Iterator[dict]:
    """In the block, `kernel[grid](...)` launches nothing. Yields the calls, each as (kernel, args, options), once."""
    calls = {}

    def note(kernel, grid):
        def call(*args, **options):
            args = tuple(Pointer(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in args)
            calls.setdefault((kernel, args, tuple(options.items())))
        return call

    triton.JITFunction.__getitem__ = note
    try:
        yield calls
    finally:
        del triton.JITFunction.__getitem__  # it is inherited


class Zeros(TorchFunctionMode):
    """New tensors are zeros where they would hold anything: what no kernel fills may be used as an index."""
    OF = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, Tensor.new_empty: Tensor.new_zeros}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.OF.get(function, function)(*args, **(kwargs or {}))
