"""Search for faster tilings of the linear layers on the GPU at hand. Those in ops/tiling.py were measured on an H100
and an H200 only.

    python -m benchmarks.tilings --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --shape llama-2-7b \\
        --quantize int4 --rows 1 16

A kernel by itself says little: on recent GPUs it overlaps with the kernels before and after it. So a tiling is judged
in verifications, all layers in a CUDA graph. One product after the other: from today's tiling on, all neighbours (a
number halved, doubled, or a little more or less) are compiled and timed, and the fastest is where the search goes on,
until no neighbour is faster. Prints Markdown: what to change in ops/tiling.py, and what it would save.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.environment import describe, environment
from benchmarks.report import table
from benchmarks.widen import SHAPES
from benchmarks.workload import Prompt, Subject, describe_subject, load
from draft import Vanilla
from engine import Engine
from model import Llama
from ops import linear
from ops.compiling import compile_kernels
from ops.device import WITHOUT, gpu_problem
from ops.graphs import timed
from ops.quantized import Quantized
from ops.tiling import Tiling
from quant.linear import GROUPS, MODES

LEAST = 0.003  # a tiling has to save this share of a verification: less is noise
WRONG = 0.05  # and features and logits may differ by this share: another order of sums moves bf16 by 1 %

Product = tuple[int, int]  # the shape of the weight's data: (rows, columns), of int4 (rows, bytes per row)


# ----- Searching ---------------------------------------------------------------------------------------------------


def neighbours(t: Tiling) -> list[Tiling]:
    """The tilings that differ in one number, or in two, so that a warp's columns, the shared memory or the number of
    programs stays about the same. Some cannot be compiled."""
    changed = [t._replace(BN=t.BN * 2), t._replace(BN=t.BN // 2), t._replace(BK=t.BK * 2), t._replace(BK=t.BK // 2),
               t._replace(warps=t.warps * 2), t._replace(warps=t.warps // 2),
               t._replace(BK=t.BK * 2, warps=t.warps * 2), t._replace(BK=t.BK // 2, warps=t.warps // 2),
               t._replace(BK=t.BK * 2, stages=t.stages // 2), t._replace(BK=t.BK // 2, stages=t.stages * 2),
               t._replace(BN=t.BN * 2, stages=t.stages // 2), t._replace(BN=t.BN // 2, stages=t.stages * 2),
               t._replace(BN=t.BN * 2, SK=t.SK * 2), t._replace(BN=t.BN // 2, SK=t.SK // 2)]
    changed += [t._replace(**{name: getattr(t, name) + step})
                for name in ("SK", "stages", "unroll") for step in (-1, 1, 3)]
    changed += [t._replace(ahead=ahead) for ahead in {t.ahead * 2, t.ahead // 2, 1} - {t.ahead}]  # powers of two, or 0
    return [c for c in dict.fromkeys(changed) if c.BN >= (1 if c.BM == 1 else 16) and c.BK >= 32 and 1 <= c.SK <= 64
            and c.warps in (1, 2, 4, 8) and 1 <= c.stages <= 12 and 0 <= c.ahead <= 16 and 1 <= c.unroll <= 8]


def search(first: Tiling, measure: Callable[[list[Tiling]], dict[Tiling, float]]) -> list[tuple[float, Tiling]]:
    """All tilings that were tried, the fastest first, with their times. `measure` gives the times of those that it can
    run. The search goes on from the fastest while that saves LEAST. Raises ValueError where `first` cannot run."""
    times = measure([first])
    if not times:
        raise ValueError(f"the tiling of ops/tiling.py cannot be timed: {numbers_of(first)}")
    best = first
    seen = {first}  # also those that cannot run
    while True:
        fresh = [t for t in neighbours(best) if t not in seen]
        seen.update(fresh)
        times |= measure(fresh) if fresh else {}
        fastest = min(times, key=times.get)
        if times[fastest] > times[best] * (1 - LEAST):
            return sorted((ms, t) for t, ms in times.items())
        best = fastest


# ----- Measuring ---------------------------------------------------------------------------------------------------


@contextmanager
def tilings(choice: dict[Product, Tiling], seen: dict[Product, Tiling] | None = None) -> Iterator[None]:
    """In the block, products of up to 128 rows have the tilings of `choice`, others those of ops/tiling.py. Those that
    are asked for are written to `seen`."""
    def chosen(original: Callable[..., Tiling]) -> Callable[..., Tiling]:
        def config(M: int, N: int, columns: int, *rest) -> Tiling:
            tiling = choice.get((N, columns)) or original(M, N, columns, *rest)
            if seen is not None:
                seen[N, columns] = tiling
            return tiling
        return config

    with patch.object(linear, "linear_config", chosen(linear.linear_config)), \
            patch.object(linear, "integer_config", chosen(linear.integer_config)):
        yield


def products_of(model: Llama) -> dict[Product, list[str]]:
    """The products of a forward: of each, the names of the linears that have these weights."""
    names = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Quantized) or isinstance(module, nn.Linear):
            shape = tuple((weight.data if isinstance(weight, Quantized) else weight).shape)
            names.setdefault(shape, []).append(path.rpartition(".")[2])
    return names


def measurer(engine: Engine, verify: Callable[[], tuple[Tensor, Tensor]], choice: dict[Product, Tiling]
             ) -> Callable[[Product, list[Tiling]], dict[Tiling, float]]:
    """A function that times tilings of one product, milliseconds of `verify`; all other products have those of
    `choice`, which may change between calls. It leaves tilings out that do not compile, that do not fit on the GPU, or
    with which features or logits come out wrong."""
    def outputs() -> tuple[Tensor, Tensor]:
        features = verify()[0]
        return features.float(), linear.linear(features, engine.model.lm_head.weight, dtype=torch.float32)

    def with_tiling(product: Product, tiling: Tiling, function: Callable[[], tuple]) -> tuple:
        with tilings(choice | {product: tiling}):
            return function()

    def quietly(product: Product, tiling: Tiling) -> None:
        with suppress(AssertionError):  # ops/linear.py asserts what a tiling must satisfy
            with_tiling(product, tiling, verify)

    wanted = outputs()

    def measure(product: Product, candidates: list[Tiling]) -> dict[Tiling, float]:
        times = {}
        with suppress(Exception):  # Triton raises anything; the others are compiled all the same
            compile_kernels(*(partial(quietly, product, t) for t in candidates))
        for tiling in candidates:
            with suppress(Exception):
                found = with_tiling(product, tiling, outputs)
                if all((a - b).norm() < WRONG * b.norm() for a, b in zip(found, wanted)):  # False for NaN
                    times[tiling] = timed(partial(with_tiling, product, tiling, verify), engine.device, 1, 3, 10)
        return times
    return measure


# ----- The command -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def search_all(engine: Engine, rows: int, length: int) -> None:
    """Search for each product of the model in turn, in verifications of `rows` nodes after a text of `length` tokens,
    and print what was found."""
    engine.compile(rows=(rows,))
    engine.freeze(length)
    verify = partial(engine.verify, engine.state.length - 1, engine.chain(rows))
    choice, found, lines = {}, {}, []
    with tilings({}, found):
        verify()
    measure = measurer(engine, verify, choice)
    for product, names in products_of(engine.model).items():
        if product not in found:  # the kernel does not take it
            continue
        name = ", ".join(dict.fromkeys(names))
        tried = search(found[product], partial(measure, product))
        today = next(ms for ms, tiling in tried if tiling == found[product])
        choice[product] = tried[0][1]
        for ms, tiling in tried[:3]:
            lines.append((name, f"{product[0]} x {product[1]}", f"{1e3 * (ms - today) / len(names):+.2f}",
                          numbers_of(tiling), numbers_of(found[product]), len(tried)))
        print(f"{rows} rows: {name}, {len(tried)} tilings, {today:.3f} -> {tried[0][0]:.3f} ms", flush=True)
    print(f"\nVerifying {rows} rows. us: for each of a forward's products of this kind.\n")
    print(table(("product", "weights", "us", "tiling", "in ops/tiling.py", "tried"), *lines))


def numbers_of(tiling: Tiling) -> str:
    return " ".join(f"{name} {number}" for name, number in tiling._asdict().items())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser("python -m benchmarks.tilings", description="Search for faster tilings on this GPU.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--shape", choices=SHAPES, help="widen the checkpoint to this shape (default: do not widen)")
    p.add_argument("--quantize", choices=MODES)
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--rows", type=int, nargs="+", default=[1, 16, 60], help="nodes verified (default: 1 16 60)")
    p.add_argument("--context", type=int, default=500, help="tokens of the text before them (default: 500)")
    p.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    args = p.parse_args(argv)
    args.device = "cuda"
    args.draft = args.draft_weights = None  # of a draft head, which --shape would widen too: none is loaded here
    args.max_new_tokens = 1  # of the text that --shape has the checkpoint write, to see which ids are in use
    if not all(1 <= rows <= linear.MAX_ROWS for rows in args.rows) or args.context < 1:
        p.error(f"--rows are from 1 to {linear.MAX_ROWS}, and --context is 1 or more")
    return args


def load_subject(args: argparse.Namespace) -> Subject:
    """The model that the options name, widened with --shape."""
    return load(args, lambda model, tokenizer: [Prompt("", 1, "", tokenizer.dialogue(["Hello!"]))])


def main() -> None:
    args = parse_args()
    if problem := gpu_problem("cuda"):
        raise ValueError(problem.removesuffix(WITHOUT))
    device = torch.device(args.device)
    subject = load_subject(args)
    print(f"{describe(environment(device))}; {describe_subject(args)} {args.context} tokens.\n")
    engine = Engine(subject.model, Vanilla(device), args.context + linear.MAX_ROWS, subject.stop_ids)
    for rows in args.rows:
        search_all(engine, rows, args.context)


if __name__ == "__main__":
    run_command(main)
