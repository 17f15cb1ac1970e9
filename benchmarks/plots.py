"""Pictures of what bench.py measured, for a README: `bench.py --plots DIR`, or from what --json wrote

    python -m benchmarks.plots out.json pictures

A picture has one panel for each temperature. The colours are Okabe and Ito's, which colour-blind people can tell apart
(jfly.uni-koeln.de/color); lines have different markers as well. A method looks the same in all pictures. There are
eight colours; from the ninth method on, bars are hatched and lines dashed.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from app.command import run_command
from benchmarks.report import read_result
from drafters.methods import BASELINE

GREY, BLUE, ORANGE = "#7f7f7f", "#0072B2", "#E69F00"  # grey: vanilla, and other engines
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = "osD^vP*X<>hp"
STYLE = {"font.size": 13, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "figure.dpi": 150, "figure.constrained_layout.use": True}
WIDTH = 1600 / 150  # inches


class Look(NamedTuple):
    """How a method is drawn."""
    colour: str = GREY
    hatch: str = ""
    marker: str = ""
    line: str = "-"


class Picture(NamedTuple):
    """A kind of picture."""
    name: str  # of its file, without .png
    panel: Callable[[Axes, list[dict], dict, dict[str, Look]], None]  # draws some entries of result["measured"]
    shows: Callable[[dict], bool]  # whether an entry has something to show
    height: Callable[[int], float]  # of a panel with this number of entries, in inches
    ours_only: bool = False  # only methods with a look of their own: neither vanilla nor other engines
    side_by_side: bool = False  # panels stand beside each other, else one below the other
    share_y: bool = False


def look_of(i: int) -> Look:
    """The look of method i."""
    hatch, line = ("///", "--") if i >= len(COLOURS) else ("", "-")
    return Look(COLOURS[i % len(COLOURS)], hatch, MARKERS[i % len(MARKERS)], line)


def draw(result: dict, folder: Path) -> list[Path]:
    """Write the pictures of `result` (benchmarks/race.py lists its keys) and return their paths. A picture that has
    nothing to show is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = [name for name, about in result["methods"].items() if name != BASELINE and "nodes" in about]
    looks = {name: look_of(i) for i, name in enumerate(ours)}
    paths = []
    with plt.rc_context(STYLE):
        for picture in PICTURES:
            entries_at = {}  # by temperature
            for e in result["measured"]:
                if picture.shows(e) and (e["method"] in looks or not picture.ours_only):
                    entries_at.setdefault(e["temperature"], []).append(e)
            if entries_at:
                paths.append(folder / f"{picture.name}.png")
                draw_picture(picture, entries_at, result, looks, paths[-1])
    return paths


def draw_picture(picture: Picture, entries_at: dict[float, list[dict]], result: dict, looks: dict[str, Look],
                 path: Path) -> None:
    """A panel for each temperature, with one legend above them."""
    heights = [picture.height(len(entries)) for entries in entries_at.values()]
    columns = 1
    if picture.side_by_side:
        columns = len(heights)
        heights = [max(heights)]
    figure, axes = plt.subplots(len(heights), columns, figsize=(WIDTH, sum(heights)), sharex=True,
                                sharey=picture.share_y, squeeze=False, height_ratios=heights)
    for (t, entries), ax in zip(entries_at.items(), axes.flat):
        picture.panel(ax, entries, result, looks)
        ax.set_title(f"temperature {t:g}" + (" (greedy)" if t == 0 else ""), loc="left", fontweight="bold")
        ax.label_outer()
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 4))
    figure.savefig(path)
    plt.close(figure)


def label_methods(ax: Axes, entries: list[dict]) -> None:
    """Write the methods' names down the vertical axis, the first at the top."""
    ax.set_yticks(range(len(entries)), [e["method"].removesuffix(" (greedy)") for e in entries])
    ax.set_ylim(len(entries) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def speed_panel(ax: Axes, entries: list[dict], result: dict, looks: dict[str, Look]) -> None:
    """Tokens per second with quartiles, and the speed-up beside them."""
    base = next((e["tokens_per_sec"]["median"] for e in entries if e["method"] == BASELINE), None)
    limit = ax.get_xlim()[1]  # the panels drawn before share this axis
    for y, e in enumerate(entries):
        speed = e["tokens_per_sec"]
        median, q1, q3 = speed["median"], speed["q1"], speed["q3"]
        look = looks.get(e["method"], Look())
        ax.barh(y, median, 0.7, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0,
                xerr=[[median - q1], [q3 - median]], error_kw={"lw": 1.5, "capsize": 4})
        speed_up = f"  {median / base:.2f}x" if base else ""
        ax.annotate(f"{median:.1f}{speed_up}", (q3, y), (9, 0), textcoords="offset points", va="center")
    label_methods(ax, entries)
    ax.set_xlabel("tokens/s, decoding alone: median and quartiles of the runs")
    ax.set_xlim(0, max(1.22 * max(e["tokens_per_sec"]["q3"] for e in entries), limit))  # room for the numbers


def category_panel(ax: Axes, entries: list[dict], result: dict, looks: dict[str, Look]) -> None:
    """Speed-up over plain decoding by category of the prompts; without plain decoding, tokens per second."""
    t = entries[0]["temperature"]
    base = next((e for e in result["measured"] if e["method"] == BASELINE and e["temperature"] == t), None)
    bar_width = 0.84 / len(entries)  # 0.84 for the bars of a category, the rest keeps categories apart
    for i, e in enumerate(entries):
        heights = []
        for category, part in e["by_category"].items():
            unit = base["by_category"][category]["tokens_per_sec"]["median"] if base else 1
            heights.append(part["tokens_per_sec"]["median"] / unit)
        offset = (i - (len(entries) - 1) / 2) * bar_width
        look = looks[e["method"]]
        ax.bar([x + offset for x in range(len(heights))], heights, 0.9 * bar_width, color=look.colour,
               hatch=look.hatch, edgecolor="white", lw=0, label=e["method"])
    ax.set_xticks(range(len(entries[0]["by_category"])), entries[0]["by_category"])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel(f"speed-up over {BASELINE}" if base else "tokens/s")
    if base:
        ax.axhline(1, color="black", lw=1, ls="--")


def acceptance_panel(ax: Axes, entries: list[dict], result: dict, looks: dict[str, Look]) -> None:
    """The share of cycles that accepted drafted tokens to each depth or deeper."""
    for e in entries:
        look = looks[e["method"]]
        shares = [100 * share for share in e["accept_by_depth"]]
        ax.plot(range(1, len(shares) + 1), shares, look.line, color=look.colour, marker=look.marker, ms=8, lw=2,
                label=e["method"])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("depth in the draft, tokens")
    ax.set_ylabel("accepted that deep, % of cycles")
    ax.set_ylim(0, 100)
    ax.grid(axis="y", color="#e5e5e5")


def cycle_panel(ax: Axes, entries: list[dict], result: dict, looks: dict[str, Look]) -> None:
    """How the milliseconds of a cycle are divided, and how many tokens it commits."""
    limit = ax.get_xlim()[1]  # the panels drawn before share this axis
    longest = max(e["split_ms"]["cycle"] for e in entries)
    for y, e in enumerate(entries):
        start = 0.0
        for part, colour in (("draft", BLUE), ("verify", ORANGE), ("other", "#b3b3b3")):
            ms = max(e["split_ms"][part], 0)  # "other" is a difference: noise may make it negative
            ax.barh(y, ms, 0.7, left=start, color=colour, label=part)
            start += ms
        ax.annotate(f"{e['split_ms']['cycle']:.2f} ms, {e['mean_gained']:.2f} tokens", (start, y), (9, 0),
                    textcoords="offset points", va="center")
    label_methods(ax, entries)
    ax.set_xlabel("milliseconds of a cycle")
    ax.set_xlim(0, max(1.36 * longest, limit))  # room for the numbers


PICTURES = (
    Picture("speed", speed_panel, lambda e: True, lambda entries: 0.8 + 0.42 * entries),
    Picture("categories", category_panel, lambda e: len(e["by_category"]) > 1, lambda entries: 3.6, ours_only=True,
            share_y=True),
    Picture("acceptance", acceptance_panel, lambda e: bool(e["accept_by_depth"]), lambda entries: 4.6,
            side_by_side=True, share_y=True),
    Picture("cycle", cycle_panel, lambda e: bool(e["split_ms"]), lambda entries: 0.9 + 0.42 * entries))


def main() -> None:
    if len(sys.argv) != 3:
        raise ValueError("usage: python -m benchmarks.plots RESULT.json FOLDER")
    print(*draw(read_result(Path(sys.argv[1])), Path(sys.argv[2])), sep="\n")


if __name__ == "__main__":
    run_command(main)
