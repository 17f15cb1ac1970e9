"""Measure all that BENCHMARKS.md shows, on the GPU at hand: one command after the other, each in a process of its own.

    python -m benchmarks.everything --mt_bench question.jsonl
    python -m benchmarks.summary --write

Each result goes to benchmarks/results/ as soon as it is there. Results of this commit, device and versions are kept, so
the same command goes on where it was stopped; those of others are replaced. What lacks a model or a file is left out,
and said.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.result_files import NAMES, RESULTS, add, read_object, read_results
from ops.device import WITHOUT, gpu_problem

DEMO = "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
CODER = "checkpoints/Qwen/Qwen2.5-Coder-1.5B-Instruct"
SMALL_CODER = "checkpoints/Qwen/Qwen2.5-Coder-0.5B-Instruct"
AS_IS = "checkpoints/Qwen/Qwen2.5-Coder-1.5B-Instruct-Q4_K_M"
CODING = "benchmarks/coding.jsonl"
DEMO_METHODS = ("lookup,lookahead,eagle,eagle2,eagle2+lookup,medusa,speculate,speculate+lookup --medusa "
                "heads/SmolLM2-135M-Instruct/medusa --speculate heads/SmolLM2-135M-Instruct/draft_model")


def commands(mt_bench: str | None) -> dict[str, str]:
    """The command behind each result: the words after `python`. Files are named as from the project's folder."""
    cycle = f"-m benchmarks.cycle --checkpoint {DEMO}"
    demo = f"bench.py --checkpoint {DEMO} --methods {DEMO_METHODS} --temperature 0 1 --runs 1 --max_new_tokens 128"
    coder = f"bench.py --questions {CODING} --max_new_tokens 256 --runs 1 --methods lookup,eagle3,eagle3+lookup"
    found = {}
    for shape, weights in (("2-7b", ("bf16", "int8", "int8dyn", "int4")), ("3-8b", ("bf16",)),
                           ("2-13b", ("bf16", "int8", "int4"))):
        for kind in weights:
            how = {"bf16": "", "int4": " --quantize int4 --tree auto"}.get(kind, f" --quantize {kind}")
            found[f"cycle-llama-{shape}-{kind}"] = (f"{cycle} --shape llama-{shape}{how} --contexts 512 "
                                                    "--max_new_tokens 96 --rounds 1 --rows")
    block = "bench.py --methods block,block+lookup --max_new_tokens 256 --runs 1"
    if mt_bench:
        found["cycle-demo-mt-bench"] = (f"{cycle} --contexts 0 --tree auto --max_new_tokens 128 --rounds 2 --questions "
                                        f"{shlex.quote(mt_bench)}")
        found["methods-demo-block"] = (f"{block} --checkpoint {DEMO} --draft {DEMO}/block --questions "
                                       f"{shlex.quote(mt_bench)}")
    found["methods-llama-2-7b"] = f"{demo} --shape llama-2-7b"
    found["methods-demo"] = demo
    found["methods-coder-bf16"] = f"{coder},speculate --speculate {SMALL_CODER} --checkpoint {CODER}"
    found["methods-coder-int8"] = f"{coder},speculate --speculate {SMALL_CODER} --checkpoint {CODER} --quantize int8"
    found["methods-coder-gguf"] = f"{coder} --checkpoint {AS_IS}"
    found["methods-coder-block"] = f"{block} --checkpoint {CODER} --draft {CODER}/block --questions {CODING}"
    return found


def missing(words: list[str]) -> str | None:
    """The first model or file that a command names and that is not there."""
    paths = (word for word in words if "/" in word or word.endswith(".jsonl"))
    return next((path for path in paths if not Path(path).exists()), None)


def measure(name: str, words: list[str], commit: str | None) -> float:
    """Run a command and keep its result under this name. Returns the seconds it took. RuntimeError if it fails, or if
    one of its methods does."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.json"
        done = subprocess.run([sys.executable, *words, "--json", str(file)])
        if done.returncode or not file.exists():
            raise RuntimeError(f"{name}: the command ended with exit status {done.returncode}")
        if failed := read_object(file).get("failed"):  # bench.py goes on without a method that fails
            reasons = "; ".join(f"{method} failed: {reason}" for method, reason in failed.items())
            raise RuntimeError(f"{name}: not kept, because {reasons}")
        add(file, name, commit)
    return time.perf_counter() - start


def main() -> int:
    p = argparse.ArgumentParser("python -m benchmarks.everything", description="Measure all that BENCHMARKS.md shows.")
    p.add_argument("--mt_bench", metavar="FILE", help="the file question.jsonl of MT-bench, for the demo model")
    p.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help="measure only these, even if they were "
                   "measured already")
    p.add_argument("--commit", help="the commit that is measured, where git does not know it")
    args = p.parse_args()
    if problem := gpu_problem("cuda"):
        raise ValueError(problem.removesuffix(WITHOUT))
    here = environment(torch.device("cuda")) | ({"commit": args.commit} if args.commit else {})
    if " " in here["commit"] or here["commit"] == "unknown":
        raise ValueError(f"the commit is {here['commit']}: commit first, or name it with --commit")
    same = [name for name, result in read_results(RESULTS).items()
            if all(result["environment"][key] == here[key] for key in ("device", "torch", "triton", "commit"))]
    lines = []
    failed = False
    known = commands(args.mt_bench)
    for name in NAMES:
        words = shlex.split(known.get(name, ""))
        if args.only and name not in args.only:
            continue
        if name in same and not args.only:
            lines.append(f"{name}: there already")
        elif not words:
            lines.append(f"{name}: left out, it needs --mt_bench FILE")
        elif lacking := missing(words):
            lines.append(f"{name}: left out, there is no {lacking}")
        else:
            try:
                lines.append(f"{name}: {measure(name, words, args.commit):.0f} s")
            except (RuntimeError, ValueError, OSError) as error:
                lines.append(str(error))
                failed = True
        print(lines[-1], file=sys.stderr, flush=True)
    print(*lines, sep="\n")
    return int(failed)


if __name__ == "__main__":
    run_command(main)
