"""Every cell of the tables that bench.py and benchmarks.cycle print, from hand-made numbers that all differ.

    python -m pytest tests/benchmarks/test_tables.py
"""
import json
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from helpers import operations

import bench
from app.answer import Run
from benchmarks import cycle, race, report, summary
from benchmarks.card import card
from benchmarks.workload import Prompt, gigabytes, kv_gigabytes, step_gb
from draft import Eagle2, Vanilla
from engine import Engine
from ops import graphs
from quant.linear import quantize_linears
from sampling import Sampling


def cells(printed: str) -> list[list[str]]:
    """The cells of a Markdown table, row by row, without the line below the heading."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    return [rows[0], *rows[2:]]


def numbers(median: float, with_prefill: float, gained: float, **more: object) -> dict:
    """What race.speeds returns, where no quartile is the median, and the rest of an entry of result["measured"]."""
    return {"tokens_per_sec": {"median": median, "q1": median - 3, "q3": median + 5, "runs": [median - 4, median + 9]},
            "with_prefill": {"median": with_prefill, "q1": with_prefill - 7, "q3": with_prefill + 8, "runs": []},
            "mean_gained": gained, "prefill_ms": 10 * gained, "cycle_ms": 100 * gained, **more}


RUNS = [{"prefill_s": [0.5, 1.5], "decode_s": [2.0, 4.0]}, {"prefill_s": [1.0, 2.0], "decode_s": [5.0, 9.0]}]
VANILLA = numbers(100.0, 80.0, 1.0, method="vanilla", temperature=0.5, same=3, gaps=[], texts=[[1]] * 3, steady=True,
                  distinct4=0.9, runs=RUNS, accept_by_depth=[], histogram=[0, 9],
                  split_ms={"draft": 0.0, "verify": 5.125, "other": 0.5, "cycle": 5.625},
                  by_category={"chat": numbers(200.0, 1.0, 1.0), "coding": numbers(50.0, 1.0, 1.0)})
EAGLE2 = numbers(250.0, 120.0, 2.5, method="eagle2", temperature=0.5, same=2, texts=[[1]] * 3, steady=False,
                 gaps=[{"gap": 0.0625}, {"gap": 0.25}, {"gap": 0.125}], distinct4=0.75, runs=RUNS[:1] * 2,
                 accept_by_depth=[0.8, 0.3], histogram=[0, 2, 5, 3],
                 split_ms={"draft": 1.25, "verify": 6.375, "other": 0.75, "cycle": 8.375},
                 by_category={"chat": numbers(300.0, 1.0, 1.75), "coding": numbers(200.0, 1.0, 3.25)})
METHODS = {"vanilla": {"nodes": 1, "own_gb": None}, "eagle2": {"nodes": 60, "own_gb": 1.375}}
RESULT = {"command": "bench.py ...", "note": "float32.", "memory_gb": 12.25,
          "prompts": [{"ids": [1] * 7}, {"ids": [2]}],
          "before": {"device": "a card", "torch": "2", "triton": "3", "commit": "abc", "date": "today"},
          "methods": METHODS, "measured": [VANILLA, EAGLE2], "failed": {"medusa": "no heads"}}


def test_speed_table() -> None:
    """Fails if a speed-up is that of a quartile, "with prefill" is without, or a cell is in another column; if the
    variation is the variance or that of all but one run, or an answer takes the time of its decoding alone."""
    assert cells(report.speed_table(0.5, [VANILLA, EAGLE2], VANILLA)) == [
        ["temperature 0.5, 2 runs", "tokens/s", "quartiles", "variation", "speed-up", "with prefill",
         "tokens per step", "first token, ms", "answer, s", "same text", "median gap", "largest gap",
         "distinct 4-grams"],
        ["vanilla", "100.0", "97.0 to 105.0", "9.0%", "1.00", "1.00", "1.00", "10.0", "6.25", "3 of 3", "", "", "0.90"],
        ["eagle2 (texts vary)", "250.0", "247.0 to 255.0", "3.6%", "2.50", "1.50", "2.50", "25.0", "4.00", "2 of 3",
         "0.12", "0.25", "0.75"]]
    alone = cells(report.speed_table(0.5, [EAGLE2 | {"same": None}], None))[1]
    assert alone[4:6] == ["", ""] and alone[9] == "own draw", "nothing to compare with"
    unknown = cells(report.speed_table(0.5, [EAGLE2 | {"mean_gained": None, "gaps": []}], None))[1]
    assert unknown[6] == unknown[10] == unknown[11] == "" and report.variation([3.0]) == report.variation([0, 0]) == ""


def test_cycle_table() -> None:
    """Fails if draft and verify, or the cycle and its mean in the runs, are swapped."""
    assert cells(report.cycle_table(0.5, [VANILLA, EAGLE2], METHODS)) == [
        ["temperature 0.5", "rows", "draft, ms", "verify, ms", "other, ms", "cycle, ms", "in the runs, ms",
         "own memory, GB"],
        ["vanilla", "1", "0.000", "5.125", "0.500", "5.625", "100.000", ""],
        ["eagle2", "60", "1.250", "6.375", "0.750", "8.375", "250.000", "1.38"]]


def test_category_and_depth_tables() -> None:
    """Fails if a category is compared with another one or with all prompts, or if a depth is off by one."""
    assert cells(report.category_table(0.5, [VANILLA, EAGLE2], VANILLA)) == [
        ["temperature 0.5: speed-up (tokens per step)", "chat", "coding"],
        ["vanilla", "1.00 (1.00)", "1.00 (1.00)"], ["eagle2", "1.50 (1.75)", "4.00 (3.25)"]]
    assert cells(report.category_table(0.5, [EAGLE2], None))[1] == ["eagle2", "300.0 (1.75)", "200.0 (3.25)"]
    assert cells(report.depth_table(0.5, [EAGLE2])) == [
        ["temperature 0.5: accepted to depth (no deeper)", "0", "1", "2"],
        ["eagle2", "100% (20%)", "80% (50%)", "30% (30%)"]]


def test_whole_report() -> None:
    """Fails if a table is missing, an entry is in the table of another temperature, or a failed method is not told."""
    warm = [entry | {"temperature": 1.0} for entry in (VANILLA, EAGLE2)]
    said = report.report(RESULT | {"measured": [VANILLA, EAGLE2, *warm]})
    assert "float32. 2 prompts of at most 7 tokens; peak memory 12.2 GB." in said and said.startswith("`bench.py ...`")
    assert said.endswith("medusa failed: no heads") and "a card" in said
    for t, entries in ((0.5, [VANILLA, EAGLE2]), (1.0, warm)):
        for table in (report.speed_table(t, entries, entries[0]), report.cycle_table(t, entries, METHODS),
                      report.category_table(t, entries, entries[0]), report.depth_table(t, entries[1:])):
            assert said.count(table) == 1


def test_card() -> None:
    """Fails if the card lacks what decides speed, takes it from the wrong moment, or names folders of the machine."""
    gpu = {"power.limit": "350 W", "clocks.sm": "1500 MHz", "clocks.max.sm": "1980 MHz", "clocks.mem": "2619 MHz",
           "temperature.gpu": "50", "driver_version": "580", "cuda": "13.0", "python": "3.12"}
    after = RESULT["before"] | gpu | {"clocks.sm": "1400 MHz", "temperature.gpu": "70"}
    settings = {"questions": "/home/me/q.jsonl", "max_new_tokens": "256", "runs": "2", "draft": "/home/me/heads/best"}
    methods = {"vanilla": METHODS["vanilla"], "eagle2": METHODS["eagle2"] | {"max_depth": 6}, "theirs": {}}
    theirs = EAGLE2 | {"method": "theirs", "mean_gained": None, "steady": True, "said": [
        {"prompt_tokens": 9, "cached_tokens": 4, "other_prompt": False}]}
    said = card(RESULT | {
        "before": RESULT["before"] | gpu, "after": after, "settings": settings, "methods": methods,
        "note": "Name, batch 1, bfloat16, weights int8.", "measured": [VANILLA, EAGLE2, theirs],
        "command": "python bench.py --checkpoint /home/me/Name --json x.json --runs 2",
        "endpoints": {"theirs": {"url": "http://x/v1", "model": "N", "prompts": "ids"}}})
    settings_table, results, rest = said.partition("\n\n")[2].split("\n\n", 2)
    assert said.startswith("### Name on a card\n\n") and "home" not in said
    assert dict(cells(settings_table)[1:]) == {
        "device": "a card", "power limit": "350 W", "driver, CUDA": "580, 13.0", "date": "today",
        "clocks": "SM 1500 MHz before, 1400 MHz after, of 1980 MHz; memory 2619 MHz",
        "temperature": "50 °C before, 70 °C after", "model": "batch 1, bfloat16, weights int8.",
        "versions": "torch 2, triton 3, Python 3.12, this project abc",
        "eagle2": "best; 60 rows, at most 6 drafted tokens accepted",
        "theirs": "N, prompts as ids; its server was started with: (fill in)",
        "prompts": "2 of q.jsonl, at most 7 tokens; 256 new tokens; 2 runs, in turns; batch 1"}
    assert cells(results)[1:] == [
        ["vanilla", "100.0", "9.0%", "1.00", "1.00", "10.0", "3 of 3", "", ""],
        ["eagle2", "250.0", "3.6%", "2.50", "2.50", "25.0", "2 of 3", "0.12", "0.25"],
        ["theirs", "250.0", "3.6%", "2.50", "", "25.0", "2 of 3", "0.12", "0.25"]]
    assert "theirs: 4 of 9 prompt tokens" in rest and "medusa failed: no heads" in rest
    assert rest.endswith("```\npython bench.py --checkpoint Name --runs 2\n```")


def test_older_and_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if `bench.py compare OLD NEW` or `benchmarks.report NEW OLD` take one for the other, or if it is not told
    that other prompts, another commit or other versions were measured."""
    faster = VANILLA | {"tokens_per_sec": {"median": 150.0, "q1": 140.0, "q3": 160.0, "runs": [140.0, 160.0]}}
    before = RESULT["before"] | {"clocks.sm": "1500 MHz", "temperature.gpu": "50"}
    changed = {"commit": "def", "torch": "9", "date": "later", "clocks.sm": "1400 MHz", "temperature.gpu": "60"}
    methods = {name: about | {"max_depth": 6} for name, about in METHODS.items()}
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    for path, entry, now, ids in ((old, VANILLA, before, 2), (new, faster, before | changed, 3)):
        path.write_text(json.dumps(RESULT | {
            "measured": [entry], "settings": {}, "methods": methods, "before": now,
            "prompts": [{"ids": [1] * 7}, {"ids": [ids]}]}))
    assert bench.reread(["compare", str(old), str(new)]) == 0
    compared = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report", str(new), str(old)])
    report.main()
    assert capsys.readouterr().out.endswith(compared)
    rows, *lines = compared.rstrip("\n").split("\n\n")
    assert cells(rows)[1] == ["vanilla", "0.5", "100.0", "150.0", "1.500", "yes"]
    assert [line.partition(" differs")[0] for line in lines[0].splitlines()] == ["torch", "commit", "prompts"]


def test_a_bar_in_a_cell() -> None:
    """Fails if a name that has a "|" in it becomes two cells."""
    assert report.table(("a|b", "c"), (1, "`d|e`")).splitlines()[::2] == ["| a\\|b | c      |", "| 1    | `d\\|e` |"]


def test_pictures_show_the_numbers() -> None:
    """Fails if a bar, a line or a label is that of another number, part, depth, method or temperature."""
    figures = pytest.importorskip("matplotlib.figure")
    from benchmarks import plots

    def panel(draw, entries: list[dict]) -> tuple:
        ax = figures.Figure().subplots()
        draw(ax, entries, {"measured": [faster, VANILLA, EAGLE2]}, {"eagle2": plots.look_of(0)})
        return ax, [text.get_text() for text in ax.texts]

    faster = VANILLA | {"temperature": 0.0, "by_category": EAGLE2["by_category"]}
    ax, texts = panel(plots.speed_panel, [VANILLA, EAGLE2])
    assert texts == ["100.0  1.00x", "250.0  2.50x"] and [bar.get_width() for bar in ax.patches] == [100.0, 250.0]
    spreads = [bars.lines[2][0].get_segments()[0][:, 0].tolist() for bars in ax.containers if hasattr(bars, "has_xerr")]
    assert spreads == [[97.0, 105.0], [247.0, 255.0]]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["vanilla", "eagle2"] and ax.get_ylim()[0] > ax.get_ylim()[1], "the first is at the top"
    ax, _ = panel(plots.category_panel, [EAGLE2])
    assert [bar.get_height() for bar in ax.patches] == [1.5, 4.0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["chat", "coding"]
    ax, _ = panel(plots.acceptance_panel, [EAGLE2])
    assert ax.lines[0].get_xydata().tolist() == [[1, 80], [2, 30]] and ax.lines[0].get_label() == "eagle2"
    ax, texts = panel(plots.cycle_panel, [EAGLE2])
    assert [(bars.get_label(), bars[0].get_x(), bars[0].get_width()) for bars in ax.containers] == [
        ("draft", 0.0, 1.25), ("verify", 1.25, 6.375), ("other", 7.625, 0.75)]
    assert texts == ["8.38 ms, 2.50 tokens"] and len({plots.look_of(i)[:2] for i in range(16)}) == 16


def test_all_runs_count() -> None:
    """Fails if the numbers of a category are those of the first run alone, or of other prompts; if a text of another
    run is taken, or the first token counts."""
    prompts = [Prompt("1", 1, "x", [7]), Prompt("2", 1, "y", [8]), Prompt("3", 1, "x", [9])]
    runs = [[Run([1, 2, 3, 4], [3], 0.5 * s, s), Run([5, 6, 7], [1, 1], 1.0, 4 * s), Run([9] * 6, [5], 1.0, s)]
            for s in (1.0, 2.0, 4.0)]
    entry = race.summarise("m", 0.0, {"m": runs}, prompts, None, {"max_depth": 2, "split_ms": {"0.0": {"draft": 1}}})
    speeds = {category: part["tokens_per_sec"] for category, part in entry["by_category"].items()}
    assert speeds["x"]["runs"] == [4.0, 2.0, 1.0] and speeds["y"]["runs"] == [0.5, 0.25, 0.125]
    assert speeds["x"]["median"] == 2.0 and speeds["y"]["median"] == 0.25
    assert entry["tokens_per_sec"]["median"] == 10 / 12 and entry["by_category"]["x"]["prefill_ms"] == 1000.0
    assert entry["by_category"]["y"]["cycle_ms"] == 4000.0 and entry["cycle_ms"] == 3000.0
    assert entry["texts"] == [[1, 2, 3, 4], [5, 6, 7], [9] * 6] and entry["gained"] == [[3], [1, 1], [5]]
    assert entry["runs"][1] == {"prefill_s": [1.0, 1.0, 1.0], "decode_s": [2.0, 8.0, 2.0]}
    assert entry["accept_by_depth"] == [0.5, 0.5] and entry["histogram"] == [0, 2, 0, 1, 0, 1]
    assert entry["split_ms"] == {"draft": 1} and entry["same"] is None and entry["steady"]
    assert entry["with_prefill"]["runs"] == [13 / 8.5, 13 / 15, 13 / 28]


@pytest.mark.slow
def test_split_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part of the cycle is counted in another, or if the cycle that is timed is not a whole one. It counts
    operations instead of milliseconds."""
    monkeypatch.setattr(graphs, "elapsed", operations)
    model, head = tiny.pair(0, dtype=torch.float32)
    engine = Engine(model, Eagle2(head, model, 8, 3, 3), 128)
    for t in (0.0, 1.0):
        split = race.split_cycle(engine, [1, 2, 3], 20, t)
        base = engine.state.length - 1
        with torch.inference_mode():
            tree = engine.drafter.propose(engine.state)
            assert split["draft"] == operations(partial(engine.drafter.propose, engine.state))
            assert split["verify"] == operations(partial(engine.verify, base, tree))
            assert split["cycle"] == operations(engine.cycle) == split["draft"] + split["verify"] + split["other"]
        assert split["other"] > 0 and engine.state.sampling == Sampling(t) and 13 <= int(engine.state.length) <= 17
    plain = race.split_cycle(Engine(model, Vanilla(), 128), [1, 2, 3], 20, 0.0)
    assert plain["draft"] == 0 and plain["verify"] > 0


def test_cycle_numbers() -> None:
    """Fails if benchmarks.cycle takes the seconds of one round, or counts the first token; if a rate is of other bytes
    or of another time; if a ratio is upside down."""
    rounds = [[Run([1, 2, 3], [2], 9.0, s), Run([1, 2, 3, 4], [1, 2], 9.0, s)] for s in (1.0, 5.0, 2.0)]
    assert cycle.speed_of(rounds) == {"tokens_per_sec": 1.25, "mean_gained": 5 / 3, "cycle_ms": pytest.approx(4000 / 3)}
    context = {"context": 512, "timed_at": 640, "sum_ms": 8.0, "cycle_ms": 10.0, "cycle_gb": 20.0, "between_ms": 0.25,
               "vanilla_ms": 5.0, "vanilla_gb": 14.0, "verify_ratio": 1.2, "cycle_ratio": 2.0, "efficiency": 0.875,
               "parts": [{"part": "draft: extend, 7 rows", "ms": 1.0, "gb": 0.5},
                         {"part": "draft: expansion 1, 10 rows", "ms": 0.5, "gb": 0.25},
                         {"part": "rerank", "ms": 0.125, "gb": 0}, {"part": "verify, 60 rows", "ms": 6.0, "gb": 15.0}],
               "rows_ms": {"1": 4.0, "60": 6.0},
               "speed": {"vanilla": {"tokens_per_sec": 200.0, "mean_gained": 1.0, "cycle_ms": 5.0},
                         "eagle2": {"tokens_per_sec": 350.0, "mean_gained": 4.0, "cycle_ms": 11.0}}}
    assert cells(cycle.speed_table(context).partition("\n\n")[0]) == [
        ["prompts of at most 512 tokens", "tokens/s", "speed-up", "tokens per step", "ms per cycle"],
        ["vanilla", "200.0", "1.00", "1.00", "5.000"], ["eagle2", "350.0", "1.75", "4.00", "11.000"]]
    assert "87.5% of the 400.0 tokens/s" in cycle.speed_table(context)
    parts = [["draft: extend, 7 rows", "1.000", "0.50", "500", "20%"],
             ["draft: expansion 1, 10 rows", "0.500", "0.25", "500", "20%"], ["rerank", "0.125", "", "", ""],
             ["verify, 60 rows", "6.000", "15.00", "2500", "100%"], ["sum of these", "8.000", "20.00", "2500", "100%"],
             ["cycle", "10.000", "20.00", "2000", "80%"], ["between two cycles (wall-clock)", "0.250", "", "", ""],
             ["vanilla's cycle", "5.000", "14.00", "2800", "112%"]]
    ratios = [["verify / vanilla", "1.20", "", "", ""], ["cycle / vanilla", "2.00", "", "", ""]]
    heading = ["after 640 tokens", "ms", "GB read", "GB/s", "of 2500 GB/s"]
    assert cells(cycle.parts_table(context, 2500.0)) == [heading, *parts, *ratios]
    result = {"model": "Wide", "precision": "int8", "contexts": [context], "memory_gb": 9.5, "read_gb_s": 2500.0}
    assert cells(summary.parts_table({"a": result})) == [heading, *parts]
    assert cells(summary.summary_table({"a": result}))[1] == [
        "Wide", "int8", "512", "60/2/10", "200.0", "350.0", "1.75x", "4.00", "11.000", "1.20", "2.00", "9.5"]
    assert cells(summary.rows_table({"a": result})) == [
        ["rows verified", "after, tokens", "1", "60"], ["Wide int8, ms", "640", "4.000", "6.000"]]
    names = {"7b_vanilla": "200", "7b_eagle2": "350", "7b_speedup": "1.75", "demo_vanilla": None}
    assert {name: summary.quote(name, {summary.QUOTED["7b"]: result}) for name in names} == names
    said = cycle.last_table({"device": "a card", "read_gb_s": 1.0, "copy_gb_s": 2.0, "memory_gb": 3.0, "device_gb": 4.0,
                             "startup_s": {"cold": {"first text": 6.0, "imports": 2.0, "kernels": 3.5},
                                           "warm": {"first text": 2.5, "imports": 2.0}}})
    first, second = said.partition("\n\n")[2].split("\n\n")
    assert cells(first)[1] == ["1.0", "2.0", "3.0", "4.0"]
    assert cells(second) == [["start, s", "first text", "imports", "kernels"], ["cold", "6.00", "2.00", "3.50"],
                             ["warm", "2.50", "2.00", "0.00"]]


def test_what_a_step_reads() -> None:
    """Fails if scales are not counted, an embedding is, or of the cache more or less than the text's slots."""
    model = tiny.target(0, torch.float32)
    model.allocate_cache(100, 28)
    layers = 2 * (64 * 32 + 32 * 32 + 96 * 32 + 32 * 48 + 2 * 32)
    assert gigabytes(model.layers) == pytest.approx(4e-9 * layers)
    assert kv_gigabytes(model.kv, 50) == pytest.approx(4e-9 * 2 * 2 * 2 * 50 * 8)
    assert step_gb(model, 50) == pytest.approx(4e-9 * (layers + 24 * 32 + 2 * 2 * 2 * 50 * 8))
    quantize_linears(model, "int8")
    head = model.lm_head
    assert gigabytes(head) == gigabytes(head.weight) == pytest.approx(1e-9 * (24 * 32 + 4 * 24))
    assert gigabytes(head.weight, model.norm.weight) == pytest.approx(1e-9 * (24 * 32 + 4 * 24 + 4 * 32))


def test_methods_page() -> None:
    """Fails if BENCHMARKS.md's tables of methods show a quartile, another category or another temperature."""
    kept = [entry | {"largest_gap": gap} for entry, gap in ((VANILLA, None), (EAGLE2, 0.25))]
    result = {"measured": kept, "methods": METHODS, "num_prompts": 3}
    assert cells(summary.methods_table({"a": result})) == [
        ["temperature 0.5", "rows", "tokens/s", "speed-up", "tokens per step", "chat", "coding", "same text",
         "largest gap", "distinct 4-grams"],
        ["vanilla", "1", "100.0", "1.00", "1.00", "1.00 (1.00)", "1.00 (1.00)", "3 of 3", "", "90%"],
        ["eagle2", "60", "250.0", "2.50", "2.50", "1.50 (1.75)", "4.00 (3.25)", "2 of 3", "0.25", "75%"]]
    assert cells(summary.split_table({"a": result}))[2] == ["eagle2", "1.250", "6.375", "0.750", "8.375", "250.000"]
