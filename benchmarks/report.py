"""The Markdown tables of what bench.py measured, and what changed since an earlier run; a cycle's parts, too.

    python -m benchmarks.report new.json           # the tables of `bench.py ... --json new.json` again
    python -m benchmarks.report new.json old.json  # and what changed since old.json

benchmarks/race.py lists the keys of such a file.
"""
import json
import sys
from hashlib import sha256
from pathlib import Path
from statistics import fmean, median, stdev

from app.command import run_command
from benchmarks.environment import describe
from benchmarks.result_files import DAMAGED
from drafters.methods import BASELINE

CHANGES_BY_ITSELF = ("date", "clocks.sm", "temperature.gpu")  # from minute to minute


def table(*rows: tuple) -> str:
    """A Markdown table with aligned columns; the first row is the heading."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells) + "\n"


def parts_rows(context: dict, read_gb_s: float) -> list[tuple]:
    """The rows of a table of where the time of a cycle goes, from an entry of what benchmarks/cycle.py measured. The
    rates are compared with the device's, `read_gb_s`."""
    def row(name: str, ms: float, gb: float) -> tuple:
        if not gb:
            return name, f"{ms:.3f}", "", "", ""
        rate = 1e3 * gb / ms
        return name, f"{ms:.3f}", f"{gb:.2f}", f"{rate:.0f}", f"{rate / read_gb_s:.0%}"

    return [(f"after {context['timed_at']} tokens", "ms", "GB read", "GB/s", f"of {read_gb_s:.0f} GB/s"),
            *(row(part["part"], part["ms"], part["gb"]) for part in context["parts"]),
            row("sum of these", context["sum_ms"], context["cycle_gb"]),
            row("cycle", context["cycle_ms"], context["cycle_gb"]),
            row("between two cycles (wall-clock)", context["between_ms"], 0),
            row("vanilla's cycle", context["vanilla_ms"], context["vanilla_gb"])]


def report(result: dict) -> str:
    """For each temperature: speeds, what a cycle takes, speeds by category, and how deep drafts are accepted."""
    lengths = [len(p["ids"]) for p in result["prompts"]]
    parts = [f"`{result['command']}`\n\n{describe(result['before'])}; {result['note']} {len(lengths)} prompts of at "
             f"most {max(lengths)} tokens; peak memory {result['memory_gb']:.1f} GB.\n"]
    for t in dict.fromkeys(e["temperature"] for e in result["measured"]):
        entries = [e for e in result["measured"] if e["temperature"] == t]
        base = next((e for e in entries if e["method"] == BASELINE), None)
        parts += [speed_table(t, entries, base),
                  cycle_table(t, [e for e in entries if e["split_ms"]], result["methods"]),
                  category_table(t, entries, base),
                  depth_table(t, [e for e in entries if e["accept_by_depth"]])]
    failed = [f"{name} failed: {error}" for name, error in result["failed"].items()]
    return "\n".join([*(part for part in parts if part), *failed])


def speed_up(entry: dict, base: dict | None, key: str = "tokens_per_sec") -> str:
    """The speed in `entry` / that in `base`; "" where there is no base to compare with."""
    return f"{entry[key]['median'] / base[key]['median']:.2f}" if base and base[key]["median"] else ""


def variation(runs: list[float]) -> str:
    """The coefficient of variation of what was measured once a run: standard deviation / mean."""
    return f"{stdev(runs) / fmean(runs):.1%}" if len(runs) > 1 and fmean(runs) else ""


def steps_cell(entry: dict) -> str:
    """Tokens per step, where they are known."""
    return "" if entry["mean_gained"] is None else f"{entry['mean_gained']:.2f}"


def same_cells(e: dict) -> tuple[str, str, str]:
    """How many texts are vanilla's, and the median and the largest of the gaps where the others part from them."""
    gaps = [at["gap"] for at in e["gaps"]]
    same = "own draw" if e["same"] is None else f"{e['same']} of {len(e['texts'])}"
    return same, *(f"{of(gaps):.2g}" if gaps else "" for of in (median, max))


def speed_table(t: float, entries: list[dict], base: dict | None) -> str:
    def row(e: dict) -> tuple:
        speed = e["tokens_per_sec"]
        seconds = median(fmean(map(sum, zip(run["prefill_s"], run["decode_s"]))) for run in e["runs"])
        return (e["method"] + ("" if e["steady"] else " (texts vary)"), f"{speed['median']:.1f}",
                f"{speed['q1']:.1f} to {speed['q3']:.1f}", variation(speed["runs"]), speed_up(e, base),
                speed_up(e, base, "with_prefill"), steps_cell(e), f"{e['prefill_ms']:.1f}", f"{seconds:.2f}",
                *same_cells(e), f"{e['distinct4']:.2f}")

    runs = len(entries[0]["runs"])
    heading = (f"temperature {t:g}, {runs} run{'s' * (runs > 1)}", "tokens/s", "quartiles", "variation", "speed-up",
               "with prefill", "tokens per step", "first token, ms", "answer, s", "same text", "median gap",
               "largest gap", "distinct 4-grams")
    return table(heading, *map(row, entries)) + "".join(map(about_endpoint, entries))


def about_endpoint(e: dict) -> str:
    """Lines on what one should know of the prompts that an endpoint read; "" if it is nothing."""
    said = [s for s in e.get("said", ()) if s["prompt_tokens"] is not None]
    total, cached = (sum(s[key] for s in said) for key in ("prompt_tokens", "cached_tokens"))
    other = sum(s["other_prompt"] for s in said)
    lines = ""
    if cached:
        lines += (f"\n{e['method']}: {cached} of {total} prompt tokens were in its prefix cache, so its first tokens "
                  "came sooner.\n")
    if other:
        lines += (f"\n{e['method']}: its template made other prompts than ours of {other} of {len(e['said'])}: its "
                  "texts there answer something else.\n")
    return lines


def cycle_table(t: float, entries: list[dict], methods: dict) -> str:
    """The parts of a cycle, timed alone at one moment of a text; and the mean time of a cycle in the runs."""
    def row(e: dict) -> tuple:
        about = methods[e["method"]]
        ms = e["split_ms"]
        own_gb = "" if about["own_gb"] is None else f"{about['own_gb']:.2f}"
        return (e["method"], about["nodes"], *(f"{ms[part]:.3f}" for part in ("draft", "verify", "other", "cycle")),
                f"{e['cycle_ms']:.3f}", own_gb)

    heading = (f"temperature {t:g}", "rows", "draft, ms", "verify, ms", "other, ms", "cycle, ms", "in the runs, ms",
               "own memory, GB")
    return table(heading, *map(row, entries)) if entries else ""


def category_table(t: float, entries: list[dict], base: dict | None) -> str:
    """Speed by category of the prompts; "" if there is only one."""
    def cell(part: dict, category: str) -> str:
        speed = speed_up(part, base and base["by_category"][category]) or f"{part['tokens_per_sec']['median']:.1f}"
        return f"{speed} ({steps_cell(part) or '?'})"

    categories = entries[0]["by_category"]
    if len(categories) < 2:
        return ""
    heading = (f"temperature {t:g}: {'speed-up' if base else 'tokens/s'} (tokens per step)", *categories)
    return table(heading, *((e["method"], *(cell(part, category) for category, part in e["by_category"].items()))
                            for e in entries))


def depth_table(t: float, entries: list[dict]) -> str:
    """The share of cycles that accepted drafted tokens at least to each depth, and in brackets exactly to it. A cycle
    that accepts to depth d commits d + 1 tokens."""
    if not entries:
        return ""
    deepest = max(len(e["accept_by_depth"]) for e in entries)

    def row(e: dict) -> tuple:
        cycles = max(1, sum(e["histogram"]))
        at_least = [1.0, *e["accept_by_depth"]]
        exactly = (e["histogram"] + [0] * len(at_least))[1:]
        cells = [f"{share:.0%} ({count / cycles:.0%})" for share, count in zip(at_least, exactly)]
        return e["method"], *cells, *[""] * (deepest + 1 - len(cells))

    return table((f"temperature {t:g}: accepted to depth (no deeper)", *range(deepest + 1)), *map(row, entries))


def compare_results(old: dict, new: dict) -> str:
    """How speeds changed, and which settings did. A change is beyond the spread if all runs of one result are faster
    than all runs of the other."""
    old_speeds, new_speeds = ({(e["method"], e["temperature"]): e["tokens_per_sec"] for e in result["measured"]}
                              for result in (old, new))
    rows = []
    for name, t in dict.fromkeys([*new_speeds, *old_speeds]):
        a, b = old_speeds.get((name, t)), new_speeds.get((name, t))
        row = (name, f"{t:g}", *(f"{x['median']:.1f}" if x else "" for x in (a, b)))
        if a and b:
            beyond = min(b["runs"]) > max(a["runs"]) or max(b["runs"]) < min(a["runs"])
            ratio = f"{b['median'] / a['median']:.3f}" if a["median"] else ""
            row += (ratio, "yes" if beyond else "no")
        rows.append(row + ("",) * (6 - len(row)))
    heading = ("method", "temperature", "old tokens/s", "new tokens/s", "ratio", "beyond the spread")
    return "\n".join([table(heading, *rows), *changed_settings(old, new)])


def changed_settings(old: dict, new: dict) -> list[str]:
    """A line for each setting that differs. Settings of one method count only where both results have it."""
    before, after = settings(old), settings(new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        method, is_of_method, _ = key.partition(": ")
        if is_of_method and not (method in old["methods"] and method in new["methods"]):
            continue
        if before.get(key) != after.get(key):
            lines.append(f"{key} differs: {before.get(key)} -> {after.get(key)}")
    return lines


def settings(result: dict) -> dict[str, object]:
    """Everything that could explain why the numbers of two results differ."""
    environment = {key: value for key, value in result["before"].items() if key not in CHANGES_BY_ITSELF}
    prompts = json.dumps([p["ids"] for p in result["prompts"]]).encode()
    of_methods = {f"{name}: {key}": about.get(key) for name, about in result["methods"].items()
                  for key in ("nodes", "max_depth")}
    return {**result["settings"], **environment,
            "prompts": f"{len(result['prompts'])}, SHA-256 {sha256(prompts).hexdigest()[:8]}", **of_methods}


def read_result(path: Path) -> dict:
    """What `bench.py --json` wrote; ValueError if it is something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        report(result)
        compare_results(result, result)
        for entry in result["measured"]:
            fmean(entry["tokens_per_sec"]["runs"])  # fails unless these are numbers
    except (ValueError, *DAMAGED):
        raise ValueError(f"{path}: not what bench.py --json writes") from None
    return result


def main() -> None:
    if len(sys.argv) < 2:
        raise ValueError("usage: python -m benchmarks.report NEW.json [OLD.json ...]")
    new, *older = (read_result(Path(path)) for path in sys.argv[1:])
    print(report(new), *(compare_results(old, new) for old in older), sep="\n")


if __name__ == "__main__":
    run_command(main)
