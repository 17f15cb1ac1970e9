"""BENCHMARKS.md holds what the files in benchmarks/results/ give, and these are what our own tools write."""
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPE, operations, tiny_checkpoint

import bench
from benchmarks import cycle, environment, summary
from benchmarks.environment import CLOCKS, describe
from benchmarks.result_files import NAMES, RESULTS, SHAPES, Results, add, clean_command, problems, read_results, strip
from benchmarks.summary import BLOCKS, MISSING, PAGE, render, write
from benchmarks.widen import SHAPES as KNOWN_SHAPES
from ops import graphs

CYCLES, METHODS = "cycle-llama-2-7b-bf16", "methods-llama-2-7b"
FIGURE = re.compile(r"\d[\d.,]*\s*(tokens/s|tokens per second|ms|us|µs|GB/s|x)\b")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict]]:
    """What benchmarks.cycle and bench.py write, of a tiny model on a CPU."""
    folder = tmp_path_factory.mktemp("raw")
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    questions = [{"question_id": i, "category": category, "turns": [text]} for i, (category, text) in enumerate(
        [("chat", "How old is the moon?"), ("coding", "Sort a list."), ("chat", "Name a river.")])]
    (folder / "asked.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    shared = ("--checkpoint", checkpoint, "--questions", folder / "asked.jsonl", "--device", "cpu", "--shape", "tiny",
              "--max_new_tokens", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KNOWN_SHAPES, "tiny", SHAPE)
        patch.setattr(graphs, "elapsed", operations)
        for main, name, words in (
                (cycle.main, CYCLES, ("--contexts", 60, 40, "--rounds", 1, "--rows")),
                (bench.main, METHODS, ("--methods", "lookup,eagle2", "--temperature", 0, 1, "--runs", 2))):
            patch.setattr(sys, "argv", [str(x) for x in (name, *shared, *words, "--json", folder / f"{name}.json")])
            main()
    yield {name: json.loads((folder / f"{name}.json").read_text()) for name in (CYCLES, METHODS)}


@pytest.fixture
def results(raw: dict[str, dict], tmp_path: Path) -> Results:
    """The same after --add."""
    for name, result in raw.items():
        (tmp_path / "raw.json").write_text(json.dumps(result))
        add(tmp_path / "raw.json", name, "abc1234", tmp_path)
    (tmp_path / "raw.json").unlink()
    return read_results(tmp_path)


# ----- The page and the files as they are ----------------------------------------------------------------------------


def test_page_shows_the_results() -> None:
    """Fails if a number in BENCHMARKS.md is not what the files give, or if a block is missing: then run
    `python -m benchmarks.summary --write`."""
    page = PAGE.read_text(encoding="utf-8")
    assert write(page, read_results()) == page


def test_results_belong_together() -> None:
    """Fails if results differ in device, commit or versions, if the commit is unknown, if a file is one that no table
    shows, or if it is larger than 60 KB."""
    assert problems(read_results()) == []
    files = list(RESULTS.glob("*.json"))
    assert {file.stem for file in files} <= set(NAMES)
    for file in files:
        assert file.stat().st_size <= 60_000, file


def test_no_figure_is_typed_by_hand() -> None:
    """Fails if the text between the blocks of BENCHMARKS.md states a time or a speed."""
    prose = summary.BLOCK.sub("", PAGE.read_text(encoding="utf-8"))
    assert [match[0] for match in FIGURE.finditer(prose)] == []
    typed = [FIGURE.search(text) for text in ("203.5 tokens/s", "in 5.0 ms", "6.94ms", "3.39x", "3,117 GB/s", "9 us")]
    assert all(typed), "and this test would notice"


# ----- The program ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_strip_keeps_figures_and_drops_texts(raw: dict[str, dict], results: Results, tmp_path: Path) -> None:
    """Fails if --add changes a number, keeps token ids or folders of the machine, or forgets where a result is from."""
    for name, result in results.items():
        text = (tmp_path / f"{name}.json").read_text()
        assert not {'"texts"', '"ids"', '"gained"', '"runs"'} & set(re.findall(r'"\w+"', text))
        assert str(tmp_path.parent) not in text and "/" not in result["command"].replace("benchmarks/", "")
        assert result["environment"]["commit"] == "abc1234"
        assert result["environment"]["device"].startswith("cpu") and result["environment"]["torch"] == torch.__version__
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", result["environment"]["date"])
    for old, new in zip(raw[CYCLES]["contexts"], results[CYCLES]["contexts"], strict=True):
        assert new["speed"]["eagle2"]["tokens_per_sec"] == pytest.approx(old["speed"]["eagle2"]["tokens_per_sec"], 1e-5)
        assert [part["ms"] for part in new["parts"]] == pytest.approx([part["ms"] for part in old["parts"]], 1e-5)
    for old, new in zip(raw[METHODS]["measured"], results[METHODS]["measured"], strict=True):
        assert new["same"] == old["same"] and new["mean_gained"] == pytest.approx(old["mean_gained"], 1e-5)
        assert new["largest_gap"] is None and old["gaps"] == []
    apart = [{"prompt": 0, "token": 3, "gap": 0.25}, {"prompt": 2, "token": 9, "gap": 0.125}]
    one = strip(raw[METHODS] | {"measured": [raw[METHODS]["measured"][0] | {"gaps": apart}]})
    assert one["measured"][0]["largest_gap"] == 0.25
    assert results[CYCLES]["command"] == (
        "python -m benchmarks.cycle --checkpoint checkpoint --method eagle2 --shape tiny --contexts 60 40 "
        "--max_new_tokens 12 --questions asked.jsonl --rounds 1 --rows --dtype float32 --device cpu")
    assert "--temperature 0 1 --runs 2" in results[METHODS]["command"] and "--json" not in results[METHODS]["command"]


def test_tables(results: Results) -> None:
    """Fails if a table shows another number than the file has, or shows it in another column."""
    def cells(block: str) -> list[list[str]]:
        lines = render(block, results).splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]

    part = results[CYCLES]["contexts"][0]
    vanilla, eagle2 = (part["speed"][name] for name in ("vanilla", "eagle2"))
    assert dict(zip(*(cells("summary")[i] for i in (0, 2)))) == {
        "model": "Tiny", "precision": "float32", "prompt tokens": "60", "tree": "8/4/3",
        "vanilla, tokens/s": f"{vanilla['tokens_per_sec']:.1f}", "EAGLE-2, tokens/s": f"{eagle2['tokens_per_sec']:.1f}",
        "speed-up": f"{eagle2['tokens_per_sec'] / vanilla['tokens_per_sec']:.2f}x",
        "tokens per step": f"{eagle2['mean_gained']:.2f}", "ms per cycle": f"{eagle2['cycle_ms']:.3f}",
        "verify / vanilla": f"{part['verify_ratio']:.2f}", "cycle / vanilla": f"{part['cycle_ratio']:.2f}",
        "memory, GB": f"{results[CYCLES]['memory_gb']:.1f}"}
    assert [row[:2] for row in cells("parts")[2:9]] == [[p["part"], f"{p['ms']:.3f}"] for p in part["parts"]]
    assert cells("rows")[0][2:] == list(part["rows_ms"])
    assert cells("rows")[2][2:] == [f"{ms:.3f}" for ms in part["rows_ms"].values()]

    methods, splits = cells("methods"), cells("methods-cycle")
    assert len(methods) == len(splits) == 2 * (2 + 3), "two temperatures, each a heading, a line and three methods"
    assert methods[0][5:7] == ["chat", "coding"] and methods[5][0] == "temperature 1"
    base, lookup, entry = results[METHODS]["measured"][3:]
    row, speed = methods[9], entry["tokens_per_sec"]["median"]
    assert row[:5] == ["eagle2", "8", f"{speed:.1f}", f"{speed / base['tokens_per_sec']['median']:.2f}",
                       f"{entry['mean_gained']:.2f}"]
    chat, plain = (e["by_category"]["chat"] for e in (entry, base))
    ratio = chat["tokens_per_sec"]["median"] / plain["tokens_per_sec"]["median"]
    assert row[5] == f"{ratio:.2f} ({chat['mean_gained']:.2f})" and row[7] == f"{entry['same']} of 3"
    assert row[8:] == ["", f"{entry['distinct4']:.0%}"]
    assert splits[8][:2] == ["lookup", f"{lookup['split_ms']['draft']:.3f}"]
    assert splits[9][4:] == [f"{entry['split_ms']['cycle']:.3f}", f"{entry['cycle_ms']:.3f}"]
    assert "at commit abc1234, torch" in render("about", results) and "benchmarks.cycle" in render("commands", results)
    assert render("demo", results) == MISSING


def test_several_in_a_block(raw: dict[str, dict]) -> None:
    """Fails if nobody can tell which table is of which weights, or if README is given another method's speed."""
    entry = strip(raw[METHODS] | {"note": "Coder, bfloat16."})
    results = {"methods-coder-bf16": entry, "methods-coder-int8": entry | {"note": "Coder, int8."}}
    lines = render("coder", results).splitlines()
    assert [line for line in lines if line.startswith("Coder")] == 2 * ["Coder, bfloat16."] + 2 * ["Coder, int8."]
    assert render("coder-cycle", results).count("Coder, int8.\n\n| temperature 0 ") == 1
    assert "Coder" not in render("coder", {"methods-coder-bf16": entry})
    vanilla, eagle2 = (next(e["tokens_per_sec"]["median"] for e in entry["measured"] if e["method"] == method)
                       for method in ("vanilla", "eagle2"))
    assert entry["measured"][0]["temperature"] == 0
    assert [summary.quote(f"coder_{what}", results) for what in ("vanilla", "eagle2", "speedup")] == [
        f"{vanilla:.0f}", f"{eagle2:.0f}", f"{eagle2 / vanilla:.2f}"]
    assert summary.quote("7b_vanilla", results) is None
    for typo, says in (("coder_vanila", "of coder there are speedup, vanilla"), ("code_vanilla", "and those of 7b")):
        with pytest.raises(ValueError, match=f"README.md asks for the number {typo}: .*{says}"):
            summary.quote(typo, results)


def test_tree_size(results: Results) -> None:
    """Fails if a tree is read from the names of parts, which are others for one level or a block head, although the
    file states it; or if older files have none."""
    part = results[CYCLES]["contexts"][0]
    assert part["tree"] == [8, 4, 3] and summary.tree_size(part) == "8/4/3"
    assert summary.tree_size(part | {"tree": [60, 8, 10]}) == "60/8/10"
    del part["tree"]
    assert summary.tree_size(part) == "8/4/3"


def test_a_changed_number_is_noticed(results: Results) -> None:
    """Fails if a page with one other digit, or without one block, passes for what the results give."""
    page = "".join(f"words\n<!-- table: {name} -->\n<!-- end -->\n" for name in BLOCKS)
    written = write(page, results)
    assert write(written, results) == written and written.count("words") == len(BLOCKS)
    speed = f"{results[CYCLES]['contexts'][0]['speed']['eagle2']['tokens_per_sec']:.1f}"
    changed = written.replace(speed, speed[:-1] + str((int(speed[-1]) + 1) % 10), 1)
    assert changed != written == write(changed, results)
    with pytest.raises(ValueError, match="each of these blocks once"):
        write(page.replace("<!-- table: demo -->", ""), results)


@pytest.mark.parametrize("key", ["device", "commit", "torch", "triton"])
def test_results_that_disagree(key: str, results: Results) -> None:
    """Fails if figures of two devices or of two commits may stand in one table."""
    assert problems(results) == []
    results[METHODS]["environment"][key] = "another"
    line, = problems(results)
    assert line.startswith(f"{key}: ") and f"another in {METHODS}" in line and CYCLES in line


def test_folders_stay_at_home() -> None:
    """Fails if a published command names a folder of the machine that it ran on, or a file that it wrote."""
    words = ["python", "bench.py", "--checkpoint=/home/ann/a/ckpt", "--json=/home/ann/out.json", "--plots",
             "/home/ann/p", "--draft", "/home/ann/head", "--endpoint", "x=http://127.0.0.1:1/v1,model=a/b,key=@/home/ann/key"]
    assert clean_command(words) == ("python bench.py --checkpoint ckpt --draft head --endpoint "
                                    "x=http://127.0.0.1:1/v1,model=a/b,key=@key")


def test_unknown_commit(results: Results) -> None:
    """Fails if figures of a commit that nobody knows pass."""
    for result in results.values():
        result["environment"]["commit"] = "unknown"
    assert problems(results) == [f"commit: unknown in {CYCLES}, {METHODS}"]


def test_a_gpu_with_clocks(raw: dict[str, dict]) -> None:
    """Fails if a GPU's clocks are taken for a part of its name, or if a tree with changes passes for its commit."""
    gpu = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0+cu130", "triton": "3.6.0",
           "commit": "abc and uncommitted changes", "date": "2026-11-28"}
    clocks = dict(zip(CLOCKS, ("700.00 W", "1980 MHz", "1980 MHz", "2619 MHz", "31", "580.95.05")))
    line = describe(gpu | clocks) + ", bfloat16. llama-2-7b is a shape: its cost, with the text of demo."
    assert strip(raw[CYCLES] | {"device": line})["environment"] == gpu | {"power": "700.00 W"}
    kept = strip(raw[METHODS] | {"before": gpu | clocks})["environment"]
    assert kept == gpu | clocks | {"power": "700.00 W"}


@pytest.mark.parametrize("said, shown", [
    ("700.00 W, 1500 MHz, 1980 MHz, 2619 MHz, 31, 580.95.05",
     " (power limit 700.00 W, SM clock 1500 MHz of 1980 MHz, memory 2619 MHz, 31 °C, driver 580.95.05)"),
    ("No devices were found", ""), ("", "")])
def test_what_nvidia_smi_says(said: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a clock is shown as another one, another GPU is asked, or what is no power limit is kept as one: then
    `bench.py card` does not read the file."""
    asked = []
    monkeypatch.setattr(environment.shutil, "which", lambda program: program)
    monkeypatch.setattr(environment, "device_name", lambda device: "a card")
    monkeypatch.setattr(environment, "commit_of", lambda folder: "abc")
    monkeypatch.setattr(environment, "output", lambda *words: asked.append(words[:3]) or said)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))
    found = environment.environment(torch.device("cuda"))
    assert describe(found).startswith(f"a card{shown}, torch {torch.__version__}, triton ")
    assert asked == [("nvidia-smi", "-i", "GPU-1-2")] and ("power.limit" in found) == bool(shown)


def test_readme() -> None:
    """Fails if a number in README is not what the stored results give."""
    page = summary.README.read_text(encoding="utf-8")
    assert summary.write_numbers(page, read_results()) == page and page.count("<!-- number: ") == 10


def test_command_line(results: Results, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if --write leaves the page as it was, or if results that disagree are no failure."""
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in BLOCKS))
    readme = tmp_path / "readme.md"
    readme.write_text("<!-- number: device -->?<!-- end --> and <!-- number: 7b_speedup -->9<!-- end -->x")
    monkeypatch.setattr(summary, "PAGE", page)
    monkeypatch.setattr(summary, "README", readme)
    monkeypatch.setattr(summary, "read_results", lambda: results)
    monkeypatch.setattr(sys, "argv", ["summary.py", "--write"])
    assert summary.main() == 0 and write(page.read_text(), results) == page.read_text()
    speed = results[CYCLES]["contexts"][0]["speed"]
    ratio = speed["eagle2"]["tokens_per_sec"] / speed["vanilla"]["tokens_per_sec"]
    device = results[CYCLES]["environment"]["device"]
    assert readme.read_text() == (f"<!-- number: device -->one {device}<!-- end --> and "
                                  f"<!-- number: 7b_speedup -->{ratio:.2f}<!-- end -->x")
    added = []
    monkeypatch.setattr(summary, "add", lambda *how: added.append(how))
    monkeypatch.setattr(sys, "argv", ["summary.py", "--add", "x.json", METHODS, "--commit", "abc"])
    assert summary.main() == 0 and added == [(Path("x.json"), METHODS, "abc")]
    capsys.readouterr()
    results[METHODS]["environment"]["commit"] = "fedcba9"
    monkeypatch.setattr(sys, "argv", ["summary.py"])
    assert summary.main() == 1
    printed = capsys.readouterr()
    assert all(render(name, results) in printed.out for name in BLOCKS) and "fedcba9 in methods" in printed.err


def test_damaged_results(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a stored file that lacks something ends in a traceback."""
    monkeypatch.setattr(summary, "read_results", lambda: {METHODS: {"measured": []}})
    monkeypatch.setattr(sys, "argv", ["summary.py"])
    assert summary.main() == 2
    said = capsys.readouterr().err
    assert "a file in benchmarks/results/ is damaged (KeyError" in said and said.count("\n") == 1


def test_refused(tmp_path: Path, raw: dict[str, dict]) -> None:
    """Fails if a file of something else, or a name that no table shows, is stored."""
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(raw[CYCLES]))
    with pytest.raises(ValueError, match="no table shows 'cycle-7b'"):
        add(file, "cycle-7b", None, tmp_path)
    file.write_text('{"measured": []}')
    with pytest.raises(ValueError, match="nothing was measured"):
        add(file, SHAPES[0], None, tmp_path)
    assert list(tmp_path.iterdir()) == [file]
