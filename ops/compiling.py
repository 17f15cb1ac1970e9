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
    """Compile and load all kernels that the jobs launch, or load them from Triton's cache. No kernel runs: tensors that
    kernels should fill hold zeros. All else that a job does is done. Raises the compiler's error if a kernel fails."""
    with without_launches() as calls, Zeros():
        for job in jobs:
            job()
    with one_parser(), Loader(os.cpu_count()) as loader:
        # With ignore_errors=False, a failed kernel would leave the mode switched on. The futures below raise the error.
        with triton.AsyncCompileMode(loader, ignore_errors=True):
            for kernel, args, options in calls:
                kernel.run(*args, grid=None, warmup=True, **dict(options))
    for future in loader.futures:
        future.result()


@contextmanager
def one_parser() -> Iterator[None]:
    """In the block, threads parse kernels one after another. CPython 3.11 counts the depth of `ast.parse` for all
    threads together, so two at once may raise "AST constructor recursion depth mismatch"."""
    parse, lock = triton.JITFunction.parse, Lock()

    def parse_alone(kernel):
        with lock:
            return parse(kernel)

    triton.JITFunction.parse = parse_alone
    try:
        yield
    finally:
        triton.JITFunction.parse = parse


class Loader(ThreadPoolExecutor):
    """A thread pool that also loads each kernel, in the thread that compiled it.

    Triton 3.6 compiles a C module that launches a kernel: one module for each signature. Two threads must not load the
    same one at once. If one replaces the file while Python opens it for the other, Python caches the module under the
    inode of a deleted file. A later module may get that inode, and Python would mistake the two.
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
    """torch.empty, empty_like and new_empty return zeros: no kernel fills the tensors, and some are used as indices."""
    OF = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, Tensor.new_empty: Tensor.new_zeros}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.OF.get(function, function)(*args, **(kwargs or {}))
