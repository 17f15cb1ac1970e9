"""The tables of BENCHMARKS.md, made from the JSON files in benchmarks/results/.

    python -m benchmarks.summary                                        # print all tables
    python -m benchmarks.summary --add out.json cycle-llama-2-7b-bf16   # keep one; benchmarks/everything.py keeps all
    python -m benchmarks.summary --write                                # rewrite the tables in BENCHMARKS.md

The files to add are written by `python -m benchmarks.cycle --json FILE` and `python bench.py --json FILE`. All results
must agree on device, commit and versions, because the first lines of BENCHMARKS.md name them once for all tables.
"""
import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from app.command import fail, run_command
from benchmarks.report import parts_rows, table
from benchmarks.result_files import BLOCK_HEADS, CODER, DAMAGED, NAMES, SHAPES, Results, add, problems, read_results
from drafters.methods import WITH_TREES
from formats.writing import write_text

PAGE = Path(__file__).parent.parent / "BENCHMARKS.md"
README = PAGE.with_name("README.md")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!-- number: (\w+) -->).*?(<!-- end -->)")  # in README: "7b_vanilla" is of QUOTED["7b"]
QUOTED = {"7b": "cycle-llama-2-7b-bf16", "7b_int8dyn": "cycle-llama-2-7b-int8dyn", "demo": "cycle-demo-mt-bench",
          "coder": "methods-coder-bf16", "coder_int8": "methods-coder-int8"}
MISSING = "not measured at this commit yet\n"


def about(results: Results) -> str:
    """Device, versions and commit, which all results share, and the dates."""
    found = next(iter(results.values()))["environment"]
    power = f" (power limit {found['power']})" if found["power"] else ""
    dates = sorted({result["environment"]["date"] for result in results.values()})
    return (f"Measured on one {found['device']}{power} at commit {found['commit']}, torch {found['torch']}, "
            f"Triton {found['triton']}, {' and '.join(dates)}.\n")


def contexts(results: Results) -> list[tuple[dict, dict]]:
    return [(result, part) for result in results.values() for part in result["contexts"]]


def summary_table(results: Results) -> str:
    rows = [("model", "precision", "prompt tokens", "tree", "vanilla, tokens/s", "EAGLE-2, tokens/s", "speed-up",
             "tokens per step", "ms per cycle", "verify / vanilla", "cycle / vanilla", "memory, GB")]
    for result, part in contexts(results):
        eagle2 = part["speed"]["eagle2"]
        speed, base = eagle2["tokens_per_sec"], part["speed"]["vanilla"]["tokens_per_sec"]
        rows.append((result["model"], result["precision"], part["context"], tree_size(part), f"{base:.1f}",
                     f"{speed:.1f}", f"{speed / base:.2f}x", f"{eagle2['mean_gained']:.2f}",
                     f"{eagle2['cycle_ms']:.3f}", f"{part['verify_ratio']:.2f}", f"{part['cycle_ratio']:.2f}",
                     f"{result['memory_gb']:.1f}"))
    return table(*rows)


def tree_size(part: dict) -> str:
    """Nodes/levels/top-k. In older files they are in the names of an EAGLE-2 cycle's parts alone: "verify, 60 rows",
    "draft: expansion 1, 10 rows"."""
    if "tree" in part:
        return "/".join(map(str, part["tree"]))
    rows = [(name, count.split()[0]) for name, _, count in (p["part"].partition(", ") for p in part["parts"]) if count]
    levels = [count for name, count in rows if name.startswith("draft")]
    return f"{dict(rows)['verify']}/{len(levels)}/{levels[-1]}"


def parts_table(results: Results) -> str:
    """Where the time of a cycle goes: a table for each context."""
    return "\n".join(table(*parts_rows(part, result["read_gb_s"])) for result, part in contexts(results))


def rows_table(results: Results) -> str:
    """ms of verifying 1 to 128 rows."""
    timed = [(result, part) for result, part in contexts(results) if part["rows_ms"]]
    return timed and table(("rows verified", "after, tokens", *timed[0][1]["rows_ms"]), *(
        (f"{result['model']} {result['precision']}, ms", part["timed_at"],
         *(f"{ms:.3f}" for ms in part["rows_ms"].values())) for result, part in timed))


def temperatures(results: Results) -> list[tuple[dict, float, list[dict]]]:
    """Each result once per temperature, with what was measured there; vanilla is the first."""
    return [(result, t, [entry for entry in result["measured"] if entry["temperature"] == t])
            for result in results.values() for t in dict.fromkeys(e["temperature"] for e in result["measured"])]


def title(result: dict, results: Results) -> str:
    """Which model and weights a table is of, where a block has tables of several."""
    return f"{result['note']}\n\n" if len(results) > 1 else ""


def methods_table(results: Results) -> str:
    """Speed by category: a table for each temperature, with its model where there are several."""
    tables = []
    for result, t, entries in temperatures(results):
        base = entries[0]
        rows = [(f"temperature {t:g}", "rows", "tokens/s", "speed-up", "tokens per step", *base["by_category"],
                 "same text", "largest gap", "distinct 4-grams")]
        for entry in entries:
            pairs = [(entry, base), *((part, base["by_category"][c]) for c, part in entry["by_category"].items())]
            total, *parts = [f"{part['tokens_per_sec']['median'] / of['tokens_per_sec']['median']:.2f}"
                             for part, of in pairs]
            rows.append((entry["method"], result["methods"][entry["method"]].get("nodes", ""),
                         f"{entry['tokens_per_sec']['median']:.1f}", total, f"{entry['mean_gained']:.2f}",
                         *(f"{ratio} ({part['mean_gained']:.2f})" for ratio, (part, _) in zip(parts, pairs[1:])),
                         "own draw" if entry["same"] is None else f"{entry['same']} of {result['num_prompts']}",
                         "" if entry["largest_gap"] is None else f"{entry['largest_gap']:.2f}",
                         f"{entry['distinct4']:.0%}"))
        tables.append(title(result, results) + table(*rows))
    return "\n".join(tables)


def split_table(results: Results) -> str:
    """Where a cycle of each method spends its time: a table for each temperature, as in methods_table."""
    parts = ("draft", "verify", "other", "cycle")
    tables = []
    for result, t, entries in temperatures(results):
        rows = [(entry["method"], *(f"{entry['split_ms'][part]:.3f}" for part in parts), f"{entry['cycle_ms']:.3f}")
                for entry in entries if entry["split_ms"]]
        header = (f"temperature {t:g}", *(f"{part}, ms" for part in parts), "in the runs, ms")
        tables.append(title(result, results) + table(header, *rows))
    return "\n".join(tables)


def commands_table(results: Results) -> str:
    return table(("result", "command"), *((name, f"`{result['command']}`") for name, result in results.items()))


# ----- The page ------------------------------------------------------------------------------------------------------

# What each block of BENCHMARKS.md shows: the function that prints it, and the results that it is given.
BLOCKS: dict[str, tuple[Callable[[Results], str], tuple[str, ...]]] = {
    "about": (about, NAMES), "summary": (summary_table, SHAPES), "parts": (parts_table, SHAPES[:1]),
    "rows": (rows_table, SHAPES), "methods": (methods_table, ("methods-llama-2-7b",)),
    "methods-cycle": (split_table, ("methods-llama-2-7b",)), "demo": (summary_table, ("cycle-demo-mt-bench",)),
    "demo-methods": (methods_table, ("methods-demo",)), "demo-methods-cycle": (split_table, ("methods-demo",)),
    "coder": (methods_table, CODER), "coder-cycle": (split_table, CODER),
    "block": (methods_table, BLOCK_HEADS), "block-cycle": (split_table, BLOCK_HEADS),
    "commands": (commands_table, NAMES)}


def render(block: str, results: Results) -> str:
    make, names = BLOCKS[block]
    known = {name: results[name] for name in names if name in results}
    return (known and make(known)) or MISSING


def write(page: str, results: Results) -> str:
    """The page with its blocks made anew. ValueError unless it has each of BLOCKS once."""
    if sorted(name for _, name, _ in BLOCK.findall(page)) != sorted(BLOCKS):
        raise ValueError(f"the page must have each of these blocks once: {', '.join(BLOCKS)}")
    return BLOCK.sub(lambda block: f"{block[1]}\n{render(block[2], results)}\n{block[3]}", page)


def quote(name: str, results: Results) -> str | None:
    """A number for README, greedy and of the first context that was measured; None if it was not. ValueError if nothing
    has this name."""
    key, _, what = name.rpartition("_")
    first = next(iter(results.values()), None)
    if name == "device":
        return first and f"one {first['environment']['device']}"
    if key not in QUOTED:
        raise ValueError(f"README.md asks for the number {name}: there are device, and those of {', '.join(QUOTED)}")
    if (result := results.get(QUOTED[key])) is None:
        return None
    if "contexts" in result:
        speed = {method: found["tokens_per_sec"] for method, found in result["contexts"][0]["speed"].items()}
    else:
        speed = {entry["method"]: entry["tokens_per_sec"]["median"] for entry in result["measured"]
                 if entry["temperature"] == 0}
    drafting = next(method for method in WITH_TREES if method in speed)
    if what == "speedup":
        return f"{speed[drafting] / speed['vanilla']:.2f}"
    if what not in speed:
        raise ValueError(f"README.md asks for the number {name}: of {key} there are speedup, {', '.join(speed)}")
    return f"{speed[what]:.0f}"


def write_numbers(readme: str, results: Results) -> str:
    return NUMBER.sub(lambda mark: mark[1] + (quote(mark[2], results) or "?") + mark[3], readme)


def main() -> int:
    p = argparse.ArgumentParser(description="Print the tables of BENCHMARKS.md.")
    p.add_argument("--add", nargs=2, type=Path, metavar=("FILE", "NAME"), help="keep a result in benchmarks/results/")
    p.add_argument("--commit", help="with --add: the commit that was measured, where the file does not state it")
    p.add_argument("--write", action="store_true", help="rewrite BENCHMARKS.md's tables and README's numbers")
    args = p.parse_args()
    try:
        if args.add:
            print(add(args.add[0], str(args.add[1]), args.commit))
        results = read_results()
        if args.write:
            write_text(PAGE, write(PAGE.read_text(encoding="utf-8"), results))
            write_text(README, write_numbers(README.read_text(encoding="utf-8"), results))
        elif not args.add:
            print(*(f"{name}\n\n{render(name, results)}" for name in BLOCKS), sep="\n")
        found = problems(results)
    except (ValueError, OSError) as e:
        return fail(e)
    except DAMAGED as e:
        return fail(ValueError(f"a file in benchmarks/results/ is damaged ({type(e).__name__} {e}): measure it again"))
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    run_command(main)
