"""What the GPU tests count: compiled kernels, near-ties, cycles in which the host never waits."""
import itertools
from collections.abc import Iterator

import torch

from drafters import lookup
from engine import Engine, first_difference
from ops import attention, embed_rope, linear, quantized, topk
from ops import tree as tree_kernels


def variants() -> int:
    """How many variants of our kernels Triton has compiled or loaded in this process."""
    modules = (attention, embed_rope, linear, lookup, quantized, topk, tree_kernels)
    kernels = {id(f): f for module in modules for f in vars(module).values() if hasattr(f, "device_caches")}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


def ties(vanilla: Engine, ids: list[int], text: list[int]) -> list[int]:
    """The places of `text` that plain decoding, given all that comes before them, would have filled otherwise."""
    places = []
    done = 0
    while done < len(text):
        own = sum(vanilla.generate(ids + text[:done], len(text) - done), [])
        if own == text[done:]:
            break
        places.append(done + first_difference(own, text[done:]))
        done = places[-1] + 1
    return places


def cycles_without_waiting(cycles: Iterator[list[int]], count: int) -> int:
    """How many of `count` cycles ran. Any synchronisation but that with a report's event is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return sum(1 for _ in itertools.islice(cycles, count))
    finally:
        torch.cuda.set_sync_debug_mode("default")
