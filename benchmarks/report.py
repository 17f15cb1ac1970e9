"""What bench.py measured, for people: Markdown tables, and what changed since an earlier run.

    python report.py new.json           # the tables of `bench.py ... --json new.json` again
    python report.py new.json old.json  # and what changed since another
"""
import json
import sys
from hashlib import sha256
from pathlib import Path

from benchmarks.environment import describe


def table(*rows: tuple) -> str:
    """Markdown, in columns; the first row is the heading."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells) + "\n"


def report(result: dict) -> str:
    """For each temperature: speeds, what a cycle takes, categories, and how far drafts are accepted."""
    lengths = [len(p["ids"]) for p in result["prompts"]]
    parts = [f"`{result['command']}`\n\n{describe(result['before'])}; {result['note']} {len(lengths)} prompts of at "
             f"most {max(lengths)} tokens; peak memory {result['memory_gb']:.1f} GB.\n"]
    for t in dict.fromkeys(e["temperature"] for e in result["measured"]):
        entries = [e for e in result["measured"] if e["temperature"] == t]
        base = next((e for e in entries if e["method"] == "vanilla"), None)
        parts += [speed_table(t, entries, base),
                  cycle_table(t, [e for e in entries if e["split_ms"]], result["methods"]),
                  category_table(t, entries, base), depth_table(t, [e for e in entries if e["accept_by_depth"]])]
    failed = [f"{name} failed: {error}" for name, error in result["failed"].items()]
    return "\n".join([*(part for part in parts if part), *failed])


def over(entry: dict, base: dict | None, what: str = "tokens_per_sec") -> str:
    return f"{entry[what]['median'] / base[what]['median']:.2f}" if base and base[what]["median"] else ""


def speed_table(t: float, entries: list[dict], base: dict | None) -> str:
    def row(e: dict) -> tuple:
        speed, same = e["tokens_per_sec"], e["same"]
        return (e["method"] + ("" if e["steady"] else " (texts vary)"), f"{speed['median']:.1f}",
                f"{speed['q1']:.1f} to {speed['q3']:.1f}", over(e, base), over(e, base, "with_prefill"),
                f"{e['mean_gained']:.2f}", f"{e['prefill_ms']:.1f}",
                "own draw" if same is None else f"{same} of {len(e['texts'])}",
                f"{max(at['gap'] for at in e['gaps']):.2g}" if e["gaps"] else "", f"{e['distinct4']:.2f}")

    runs = len(entries[0]["runs"])
    return table((f"temperature {t:g}, {runs} run{'s' * (runs > 1)}", "tokens/s", "quartiles", "speed-up",
                  "with prefill", "tokens a cycle", "prefill, ms", "same text", "largest gap", "distinct 4-grams"),
                 *map(row, entries))


def cycle_table(t: float, entries: list[dict], methods: dict) -> str:
    """A frozen cycle, and what a cycle took in the runs."""
    def row(e: dict) -> tuple:
        about, ms = methods[e["method"]], e["split_ms"]
        return (e["method"], about["nodes"], *(f"{ms[part]:.3f}" for part in ("draft", "verify", "other", "cycle")),
                f"{e['cycle_ms']:.3f}", "" if about["own_gb"] is None else f"{about['own_gb']:.2f}")

    return entries and table((f"temperature {t:g}", "rows", "draft, ms", "verify, ms", "other, ms", "cycle, ms",
                              "in the runs, ms", "own memory, GB"), *map(row, entries))


def category_table(t: float, entries: list[dict], base: dict | None) -> str:
    """Nothing, where all prompts are of one category."""
    def row(e: dict) -> tuple:
        return e["method"], *(
            f"{over(part, base and base['by_category'][c]) or format(part['tokens_per_sec']['median'], '.1f')} "
            f"({part['mean_gained']:.2f})" for c, part in e["by_category"].items())

    categories, what = entries[0]["by_category"], "speed-up" if base else "tokens/s"
    return "" if len(categories) < 2 else table(
        (f"temperature {t:g}: {what} (tokens a cycle)", *categories), *map(row, entries))


def depth_table(t: float, entries: list[dict]) -> str:
    """Shares of cycles: accepted to a depth, and no deeper, which is the histogram of tokens a cycle."""
    deepest = max((len(e["accept_by_depth"]) for e in entries), default=0)

    def row(e: dict) -> tuple:
        cycles, to = max(1, sum(e["histogram"])), [1.0, *e["accept_by_depth"]]
        exactly = (e["histogram"] + [0] * len(to))[1:]
        return e["method"], *(f"{share:.0%} ({count / cycles:.0%})" for share, count in zip(to, exactly)), *(
            [""] * (deepest + 1 - len(to)))

    return entries and table((f"temperature {t:g}: accepted to depth (no deeper)", *range(deepest + 1)),
                             *map(row, entries))


def against(old: dict, new: dict) -> str:
    """How speeds changed, and the settings that did. Beyond the spread: all runs of one are faster than all of the
    other's."""
    now, then = ({(e["method"], e["temperature"]): e["tokens_per_sec"] for e in r["measured"]} for r in (new, old))
    rows = []
    for name, t in dict.fromkeys([*now, *then]):
        a, b = then.get((name, t)), now.get((name, t))
        row = (name, f"{t:g}", *(f"{x['median']:.1f}" if x else "" for x in (a, b)))
        if a and b:
            apart = min(b["runs"]) > max(a["runs"]) or max(b["runs"]) < min(a["runs"])
            row += (f"{b['median'] / a['median']:.3f}", "yes" if apart else "no")
        rows.append(row + ("",) * (6 - len(row)))
    heading = "method", "temperature", "old tokens/s", "new tokens/s", "ratio", "beyond the spread"
    before, after = settings(old), settings(new)
    both = {name for name in old["methods"] if name in new["methods"]}
    return "\n".join([table(heading, *rows), *(
        f"{key} differs: {before.get(key)} -> {after.get(key)}" for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and (": " not in key or key.partition(": ")[0] in both))])


def settings(result: dict) -> dict[str, object]:
    """All that could explain other numbers, and does not change by itself from minute to minute."""
    restless = ("date", "clocks.sm", "temperature.gpu")
    known = {key: value for key, value in result["before"].items() if key not in restless}
    prompts = json.dumps([p["ids"] for p in result["prompts"]]).encode()
    return {**result["settings"], **known, "prompts": f"{len(result['prompts'])}, SHA-256 "
            f"{sha256(prompts).hexdigest()[:8]}", **{f"{name}: {key}": about.get(key) for name, about in
                                                   result["methods"].items() for key in ("nodes", "max_depth")}}


def read_result(path: Path) -> dict:
    """What bench.py wrote; ValueError if it is something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings(result)
        report(result)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{path}: not what bench.py --json writes") from None
    return result


if __name__ == "__main__":
    new, *older = (read_result(Path(path)) for path in sys.argv[1:])
    print(report(new), *(against(old, new) for old in older), sep="\n")
