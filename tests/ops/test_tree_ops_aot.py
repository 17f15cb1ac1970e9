"""ops/tree.py, ops/markov.py and ops/topk.py through Triton's compiler, without a GPU (tests/triton_tools.py). Each
launcher is called with kernels that compile what they are launched with. The numbers are test_tree_ops.py's."""
import pytest
import torch
from torch import Tensor
from triton_tools import assert_fits, compile_ahead, not_interpreted

from ops import markov, topk
from ops import tree as tree_kernels
from ops.markov import grow_markov_triton
from ops.topk import argmax, top_children
from ops.tree import accept_commit, catch_up, compact, grid, grow, gumbel_noise, rerank
from tree import State, empty_candidates, start_tree

CPU = torch.device("cpu")


class Compiling:
    """Takes the place of a kernel: a launch compiles it for three GPUs, the way it is launched, and does not run it."""
    TYPES = {torch.int64: "*i64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
             torch.bool: "*i1"}

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.compiled = set()

    def __getitem__(self, grid: tuple):
        return self.launch

    def launch(self, *args, num_warps: int = 4, **_) -> None:
        types, constants, divisible = {}, {}, []
        for parameter, value in zip(self.kernel.params, (*args, None), strict=True):  # the last one is PDL
            name, specialized = parameter.name, not parameter.do_not_specialize
            if isinstance(value, Tensor):
                types[name] = self.TYPES[value.dtype]
            elif parameter.is_constexpr or value is None or (value == 1 and specialized):
                constants[name] = value
            else:
                types[name] = "i32"
                if value % 16 == 0 and specialized:
                    divisible.append(name)
        launch = str((types, constants, divisible, num_warps))
        if launch in self.compiled:
            return
        self.compiled.add(launch)
        for arch in (86, 89, 90):
            made = compile_ahead(self.kernel, arch, types, constants | {"PDL": arch >= 90}, num_warps,
                                 divisible=divisible)
            assert_fits(made, arch, (self.kernel.__name__, launch))


@pytest.mark.slow
@not_interpreted
def test_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a kernel does not compile as it is launched, spills, or wants too much shared memory."""
    pytest.importorskip("triton")
    kernels = {}
    for module in (topk, markov, tree_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernels[name] = Compiling(getattr(module, name))
            monkeypatch.setattr(module, name, kernels[name])
    launch_all()
    assert len(kernels) == 11 and all(kernel.compiled for kernel in kernels.values())


def launch_all() -> None:
    """Call every launcher with the shapes it is used with: Llama-2's, Llama-3's and a chain's."""
    count = torch.tensor(0)
    state = State(torch.zeros(100, dtype=torch.int64), count, torch.zeros(1), count, count > 0, 0)
    for vocab, k, depth, nodes, dtype in ((32000, 10, 6, 60, torch.bfloat16), (128256, 10, 6, 64, torch.float16),
                                          (40, 1, 8, 9, torch.float32)):
        root, candidates = start_tree(k, depth, CPU)
        level = grow(torch.zeros(1, vocab, dtype=dtype), root, candidates, 0, k)
        grow(torch.zeros(k, vocab, dtype=dtype), level, candidates, 1, k)
        for noise in (None, torch.zeros(vocab)):
            grow(torch.zeros(k, vocab, dtype=dtype), level, candidates, 1, k, torch.arange(vocab), noise)
        for rank, drafted in ((512, 32000), (40, 49152)):
            w1, w2 = torch.zeros(vocab, rank, dtype=dtype), torch.zeros(drafted, rank, dtype=dtype)
            grow_markov_triton(torch.zeros(1, drafted), w1, w2, level, candidates, 1, k, level.tokens, noise)
        noise = torch.zeros(8, vocab)
        grid(torch.zeros(7, vocab), empty_candidates(7 * (nodes - 1), CPU), nodes - 1, k, None, noise)
        made = rerank(state, candidates, nodes - 1, depth)
        tokens, _ = top_children(torch.zeros(k, vocab, dtype=dtype), k)
        chosen = argmax(torch.zeros(nodes, vocab, dtype=dtype))
        stop_ids, report = tokens.new_zeros(k % 4), tokens.new_zeros(depth + 3)
        path = accept_commit(made, chosen, state, stop_ids, count, depth, report)
        for size in (128, 80)[:k]:
            kv, features = torch.zeros(2, 2, 2, 100, size, dtype=dtype), torch.zeros(nodes, 8 * size, dtype=dtype)
            compact(kv, count, path, features, features[:depth + 1])
            gumbel_noise(count, path, vocab)
        catch_up(state, depth + 1, torch.zeros(2, (depth - 1) * k, dtype=torch.int64))
