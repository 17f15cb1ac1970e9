"""Compiling kernels before they are needed, all at once.

Triton compiles a kernel when it is first launched, which takes half a second to seconds, and then goes on. A cycle
launches some fifty different kernels. So they are collected first, by running what launches them without launching
anything, and compiled together: the compiler spends nearly all of its time outside of Python's lock.
"""
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # An error that it does not ignore would leave the mode on. It is raised again below.
        with triton.AsyncCompileMode(pool, ignore_errors=True), without_launches() as compiled, Zeros():
            for job in jobs:
                job()
        kernels = {getattr(kernel, "result", lambda kernel=kernel: kernel)() for kernel in compiled.values()}
        for _ in pool.map(lambda kernel: kernel.run, kernels):  # reading this property loads a kernel
            pass


@contextmanager
def without_launches() -> Iterator[dict]:
    """In the block, `kernel[grid](...)` compiles and does not launch. Yields what it compiled, by the arguments."""
    compiled = {}

    def compile_only(kernel, grid):
        def call(*args, **options):
            traits = ((x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else (type(x), x) for x in args)
            key = id(kernel), *traits, *options.items()
            if key not in compiled:
                compiled[key] = kernel.run(*args, grid=grid, warmup=True, **options)
        return call

    triton.JITFunction.__getitem__ = compile_only
    try:
        yield compiled
    finally:
        del triton.JITFunction.__getitem__  # it is inherited


class Zeros(TorchFunctionMode):
    """New tensors are zeros where they would hold anything: what no kernel fills may be used as an index."""
    OF = {torch.empty: torch.zeros, torch.empty_like: torch.zeros_like, Tensor.new_empty: Tensor.new_zeros}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.OF.get(function, function)(*args, **(kwargs or {}))
