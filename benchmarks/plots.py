"""Pictures of what bench.py measured, for a README: `bench.py --plots DIR`, or from what --json wrote

    python plots.py out.json pictures

One panel for each temperature. Colours are Okabe and Ito's, which colour-blind people can tell apart too
(jfly.uni-koeln.de/color); lines differ by their markers as well. A method looks the same in all pictures; there are
eight colours, and from the ninth method on bars are hatched and lines dashed.
"""
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import read_result

GREY, BLUE, ORANGE = "#7f7f7f", "#0072B2", "#E69F00"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")  # vanilla and others: grey
MARKERS = "osD^vP*X<>hp"
STYLE = {"font.size": 13, "axes.titlesize": 13, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False, "figure.dpi": 150, "figure.constrained_layout.use": True}
WIDTH = 1600 / 150  # inches


class Look(NamedTuple):
    colour: str = GREY
    hatch: str = ""
    marker: str = ""
    line: str = "-"


def look_of(i: int) -> Look:
    """Of the i-th method."""
    again = i >= len(COLOURS)
    return Look(COLOURS[i % len(COLOURS)], "///" * again, MARKERS[i % len(MARKERS)], "--" if again else "-")


def draw(result: dict, folder: Path) -> list[Path]:
    """Write the pictures; returns their paths. One that there is nothing for is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    own = [name for name in result["methods"] if name != "vanilla" and "nodes" in result["methods"][name]]
    looks = {name: look_of(i) for i, name in enumerate(own)}
    pictures = []
    with plt.rc_context(STYLE):
        for name, panel, wanted, across, height in (  # height: of a panel with so many methods
                ("speed", speed, lambda e: True, False, lambda n: 0.8 + 0.42 * n),
                ("categories", categories, lambda e: e["method"] in looks and len(e["by_category"]) > 1, False,
                 lambda n: 3.6),
                ("acceptance", acceptance, lambda e: e["accept_by_depth"], True, lambda n: 4.6),
                ("cycle", cycle, lambda e: e["split_ms"], False, lambda n: 0.9 + 0.42 * n)):
            by_t = {t: [e for e in result["measured"] if e["temperature"] == t and wanted(e)]
                    for t in dict.fromkeys(e["temperature"] for e in result["measured"])}
            by_t = {t: entries for t, entries in by_t.items() if entries}
            if by_t:
                path = folder / f"{name}.png"
                picture(path, panel, by_t, result, looks, across, [height(len(entries)) for entries in by_t.values()])
                pictures.append(path)
    return pictures


def picture(path: Path, panel: Callable, by_t: dict[float, list[dict]], result: dict, looks: dict, across: bool,
            heights: list[float]) -> None:
    """A panel for each temperature, side by side or one below the other, with one legend above them."""
    heights = [max(heights)] if across else heights
    figure, axes = plt.subplots(len(heights), len(by_t) if across else 1, figsize=(WIDTH, sum(heights)), sharex=True,
                                sharey=panel in (categories, acceptance), squeeze=False, height_ratios=heights)
    for (t, entries), ax in zip(by_t.items(), axes.flat):
        panel(ax, entries, result, looks)
        ax.set_title(f"temperature {t:g}" + " (greedy)" * (t == 0), loc="left", fontweight="bold")
        ax.label_outer()
    handles = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if handles:
        figure.legend(handles.values(), handles, loc="outside upper center", ncols=min(len(handles), 4))
    figure.savefig(path)
    plt.close(figure)


def names(ax: Axes, entries: list[dict]) -> None:
    """Methods down the vertical axis, the first at the top."""
    ax.set_yticks(range(len(entries)), [e["method"].removesuffix(" (greedy)") for e in entries])
    ax.set_ylim(len(entries) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)


def speed(ax: Axes, entries: list[dict], result: dict, looks: dict) -> None:
    """Tokens a second, with quartiles, and the speed-up beside them."""
    base = next((e["tokens_per_sec"]["median"] for e in entries if e["method"] == "vanilla"), None)
    before = ax.get_xlim()[1]  # panels share it
    for y, e in enumerate(entries):
        s = e["tokens_per_sec"]
        look = looks.get(e["method"], Look())
        ax.barh(y, s["median"], 0.7, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0,
                xerr=[[s["median"] - s["q1"]], [s["q3"] - s["median"]]], error_kw={"lw": 1.5, "capsize": 4})
        times = f"  {s['median'] / base:.2f}x" if base else ""
        ax.annotate(f"{s['median']:.1f}{times}", (s["q3"], y), (9, 0), textcoords="offset points", va="center")
    names(ax, entries)
    ax.set_xlabel("tokens/s, decoding alone: median and quartiles of the runs")
    ax.set_xlim(0, max(1.22 * max(e["tokens_per_sec"]["q3"] for e in entries), before))


def categories(ax: Axes, entries: list[dict], result: dict, looks: dict) -> None:
    """Speed-up over plain decoding by category of the prompts; without plain decoding, tokens a second."""
    t = entries[0]["temperature"]
    base = next((e for e in result["measured"] if (e["method"], e["temperature"]) == ("vanilla", t)), None)
    width = 0.84 / len(entries)
    for i, e in enumerate(entries):
        ratios = [part["tokens_per_sec"]["median"] / (base["by_category"][c]["tokens_per_sec"]["median"] if base else 1)
                  for c, part in e["by_category"].items()]
        places = [x + (i - (len(entries) - 1) / 2) * width for x in range(len(ratios))]
        look = looks[e["method"]]
        ax.bar(places, ratios, 0.9 * width, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0,
               label=e["method"])
    ax.set_xticks(range(len(entries[0]["by_category"])), entries[0]["by_category"])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("speed-up over vanilla" if base else "tokens/s")
    if base:
        ax.axhline(1, color="black", lw=1, ls="--")


def acceptance(ax: Axes, entries: list[dict], result: dict, looks: dict) -> None:
    """The share of cycles whose draft was accepted to a depth or deeper."""
    for e in entries:
        look, shares = looks[e["method"]], [100 * share for share in e["accept_by_depth"]]
        ax.plot(range(1, len(shares) + 1), shares, look.line, color=look.colour, marker=look.marker, ms=8, lw=2,
                label=e["method"])
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    ax.set_xlabel("depth in the draft, tokens")
    ax.set_ylabel("accepted that deep, % of cycles")
    ax.set_ylim(0, 100)
    ax.grid(axis="y", color="#e5e5e5")


def cycle(ax: Axes, entries: list[dict], result: dict, looks: dict) -> None:
    """What a cycle's milliseconds go to, and what it commits for them."""
    before, longest = ax.get_xlim()[1], max(e["split_ms"]["cycle"] for e in entries)  # panels share it
    for y, e in enumerate(entries):
        start = 0.0
        for part, colour in (("draft", BLUE), ("verify", ORANGE), ("other", "#b3b3b3")):
            ms = max(e["split_ms"][part], 0)  # the rest may come out below nothing, by noise
            ax.barh(y, ms, 0.7, left=start, color=colour, label=part)
            start += ms
        ax.annotate(f"{e['split_ms']['cycle']:.2f} ms, {e['mean_gained']:.2f} tokens", (start, y), (9, 0),
                    textcoords="offset points", va="center")
    names(ax, entries)
    ax.set_xlabel("milliseconds of a cycle")
    ax.set_xlim(0, max(1.36 * longest, before))


if __name__ == "__main__":
    print(*draw(read_result(Path(sys.argv[1])), Path(sys.argv[2])), sep="\n")
