"""A card of a result, to paste where people compare engines: what was measured, on what, by which command.

    python bench.py card out.json
"""
import shlex
from pathlib import Path

from benchmarks.environment import CLOCKS
from benchmarks.report import about_endpoint, same_cells, speed_up, steps_cell, table, variation
from benchmarks.result_files import clean_command
from drafters.methods import BASELINE, METHODS


def card(result: dict) -> str:
    """Markdown of what `bench.py --json` wrote. Folders of this machine are left out."""
    name, _, formats = result["note"].partition(", ")
    tables = [result_table(t, [e for e in result["measured"] if e["temperature"] == t])
              for t in dict.fromkeys(e["temperature"] for e in result["measured"])]
    failed = [f"{method} failed: {error}\n" for method, error in result["failed"].items()]
    command = clean_command(shlex.split(result["command"]))
    return "\n".join([f"### {name} on {result['before']['device']}\n", setting_table(result, formats), *tables, *failed,
                      f"```\n{command}\n```"])


def setting_table(result: dict, formats: str) -> str:
    """What decides the numbers. formats: of the weights and the computation, in words."""
    before, after = result["before"], result["after"]
    rows = [("device", before["device"])]
    if CLOCKS[0] in before:  # a GPU that nvidia-smi knows
        limit, sm, most, memory, _, driver = (before[key] for key in CLOCKS)
        rows += [("power limit", limit),
                 ("clocks", f"SM {sm} before, {after['clocks.sm']} after, of {most}; memory {memory}"),
                 ("temperature", f"{before['temperature.gpu']} °C before, {after['temperature.gpu']} °C after"),
                 ("driver, CUDA", f"{driver}, {before['cuda']}")]
    rows += [("versions", f"torch {before['torch']}, triton {before['triton']}, Python {before['python']}, "
              f"this project {before['commit']}"), ("date", before["date"]), ("model", formats)]
    rows += [(name, drafting(name, result)) for name in result["methods"] if name in METHODS and name != BASELINE]
    rows += [(name, f"{how['model']}, prompts as {how['prompts']}; its server was started with: (fill in)")
             for name, how in result.get("endpoints", {}).items()]
    prompts = result["prompts"]
    questions, new_tokens, runs = (result["settings"][key] for key in ("questions", "max_new_tokens", "runs"))
    rows.append(("prompts", f"{len(prompts)} of {Path(questions).name}, at most {max(len(p['ids']) for p in prompts)} "
                 f"tokens; {new_tokens} new tokens; {runs} runs, in turns; batch 1"))
    return table(("", ""), *rows)


def drafting(name: str, result: dict) -> str:
    """What a method of ours drafted with."""
    about = result["methods"][name]
    tree = f"{about['nodes']} rows, at most {about['max_depth']} drafted tokens accepted"
    weights = METHODS[name].weights
    if weights is None:
        return tree
    given = result["settings"][weights.option]
    return f"{'head of the checkpoint' if given == 'None' else Path(given).name}; {tree}"


def result_table(t: float, entries: list[dict]) -> str:
    base = next((e for e in entries if e["method"] == BASELINE), None)

    def row(e: dict) -> tuple:
        speed = e["tokens_per_sec"]
        return (e["method"], f"{speed['median']:.1f}", variation(speed["runs"]), speed_up(e, base), steps_cell(e),
                f"{e['prefill_ms']:.1f}", *same_cells(e))

    heading = (f"temperature {t:g}", "tokens/s", "variation", "speed-up", "tokens per step", "first token, ms",
               "same text", "median gap", "largest gap")
    return table(heading, *map(row, entries)) + "".join(map(about_endpoint, entries))
