"""app/watch.py and app/draw_tree.py: records are what happened, watching changes no text, and what is printed and drawn
is complete and harmless."""
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import FLAGS, Scripted, arguments, vanilla

import generate
from app import draw_tree
from app import watch as watch_module
from app.draw_tree import answer_text, columns, token_text, tree_lines, write_page
from app.watch import RING, View, Watch
from draft import Eagle2
from drafters.heads import load_head
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup, Retrieval
from drafters.methods import METHODS, make_drafter
from engine import Engine
from model import load_model
from sampling import Sampling
from tree import Tree

CHROMIUM = Path("/usr/bin/chromium")


def watched(engine: Engine, ids: list[int], count: int, sampling: Sampling = Sampling()
            ) -> tuple[list[list[int]], list[dict]]:
    """What was committed, prefill's token first, and what Watch.read returned for each cycle."""
    news = []
    cycles = []
    for new in engine.generate(ids, count, sampling):
        news.append(new)
        cycles.append(engine.drafter.read(new))
    assert cycles.pop(0) is None and None not in cycles
    return news, cycles


# ----- What is recorded ------------------------------------------------------------------------------------------


class Remembers(Scripted):
    """Keeps each tree as (length of the text, tokens, parents, depth)."""

    def propose(self, state) -> Tree:
        tree = super().propose(state)
        self.trees.append((int(state.length), *(t.tolist() for t in tree[:3])))
        return tree


def longest(tokens: list[int], parents: list[int], text: list[int], node: int = 0) -> list[int]:
    """The longest path below `node` that spells the beginning of the text."""
    below = [i for i in range(node + 1, len(tokens)) if parents[i] == node and text and tokens[i] == text[0]]
    return max(([i, *longest(tokens, parents, text[1:], i)] for i in below), key=len, default=[])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_records_are_what_happened(seed: int) -> None:
    """Fails if a record is another cycle's, if a node gets another one's parent or choice, or if the path is too long
    or on another branch: also in the first cycle, where a stop id or the limit cuts one, and in a second answer."""
    model = tiny.target(seed % 3)
    size = [2, 7, 20, 64][seed % 4]
    ids = tiny.prompt(seed, 1 + seed)
    text = ids + vanilla(model, ids, 60)
    stop = frozenset([text[len(ids) + 25]]) if seed % 2 else frozenset()
    drafter = Remembers(text, size, 1 + seed % 8, seed)
    engine = Engine(model, Watch(drafter), 256, stop)
    for count in (40, 9):
        drafter.trees = []
        news, cycles = watched(engine, ids, count)
        at = len(ids) + 1
        for new, cycle, (length, tokens, parents, depth) in zip(news[1:], cycles, drafter.trees, strict=True):
            assert (cycle["length"], cycle["tokens"], cycle["parents"], cycle["depth"]) == (at, tokens, parents, depth)
            assert length == at and cycle["gained"] == len(new) and cycle["confidence"] is None
            assert cycle["path"] == longest(tokens, parents, text[at:])[:len(new)]
            path = [0, *cycle["path"]]
            assert [cycle["next"][node] for node in path][:len(new)] == new  # what was chosen after each, bonus and all
            at += len(new)
        assert len(cycles) == len(news) - 1 and text[len(ids):at] == sum(news, [])


def test_equal_siblings() -> None:
    """Fails if the first of two equal siblings counts as accepted where the path goes on below the second. Lookup and
    Lookahead can draft the same token twice."""
    assert watch_module.accepted_path([5, 7, 7, 8, 9], [0, 0, 0, 2, 1], [7, 8, 8, 4, 4]) == [2, 3]
    assert watch_module.accepted_path([5, 7, 7], [0, 0, 0], [7, 8, 8]) == [1]
    assert watch_module.accepted_path([5, ~7, 8], [0, 0, 1], [7, 8, 8]) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_drafter_writes_the_same(method: str, checkpoint) -> None:  # noqa: F811
    """Fails if a hook of the drafter is not passed on, or if watching changes the tokens or what each cycle commits."""
    folder, model = checkpoint
    words = [str(folder / word) if word in (".", "medusa") else word for word in FLAGS[method]]
    args = generate.parse_args(arguments(folder, *words))
    for sampling, ids in ((Sampling(), tiny.prompt(1, 9)),
                          (Sampling(temperature=1.0, top_p=0.9, seed=3), tiny.prompt(2, 30))):
        plain = list(Engine(model, make_drafter(method, args, model, 128), 128).generate(ids, 30, sampling))
        engine = Engine(model, Watch(make_drafter(method, args, model, 128)), 128)
        engine.compile(rows=(1, 8) * (method != "lookahead"))  # what it runs is not a cycle of the text
        news, cycles = watched(engine, ids, 30, sampling)
        assert news == plain
        text = ids + news[0]
        for new, cycle in zip(news[1:], cycles, strict=True):
            assert cycle["tokens"][0] == text[-1] and cycle["length"] == len(text)
            drafted = [cycle["tokens"][node] for node in cycle["path"]]
            own = [cycle["next"][cycle["path"][-1] if drafted else 0]] * (len(new) > len(drafted))
            assert drafted + own == new
            assert (cycle["confidence"] is not None) == method.startswith(("eagle2", "eagle3", "block"))
            text += new


@pytest.mark.parametrize("chain", [0, 6])
def test_confidence(chain: int) -> None:
    """Fails if a node gets another one's confidence, or if a node of the retrieved chain counts as the head's: each
    node must match a candidate of its own in path, score and origin."""
    model, head = tiny.pair(2, 0.1)
    ids = tiny.prompt(0, 12) * 2
    drafter = Eagle2(head, model, 24, 4, 5, Retrieval(chain) if chain else None)
    propose = drafter.propose
    before = []

    def spy(state):
        tree = propose(state)
        tokens, scores, parents = (t.tolist() for t in drafter.candidates[:3])
        own = len(tokens) - chain
        paths = {}
        for i, parent in enumerate(parents):
            paths[i] = () if i == own - 1 and chain else (*paths.get(parent, ()), tokens[i])
        before.append([(path, round(math.exp(scores[i]), 4), i >= own) for i, path in paths.items() if path])
        return tree

    drafter.propose = spy
    _, cycles = watched(Engine(model, Watch(drafter), 128), ids, 30)
    looked = 0
    for cycle, candidates in zip(cycles, before):
        paths = [()]
        for node in range(1, len(cycle["tokens"])):
            paths.append((*paths[cycle["parents"][node]], cycle["tokens"][node]))
            candidates.remove((paths[node], cycle["confidence"][node], node in cycle["looked_up"]))
        assert cycle["confidence"][0] == 1
        looked += len(cycle["looked_up"])
    assert (looked > 0) == (chain > 0)


@pytest.mark.slow
def test_host_reads_one_cycle_behind() -> None:
    """As on a GPU, where the next cycle runs before the last one is read, and one more runs after the end. Fails if the
    ring has one row or is indexed by the device's count, or if a late reader gets another cycle instead of an error."""
    model, head = tiny.pair(1, 0.1)
    ids = tiny.prompt(3, 7)
    found = []
    engine = Engine(model, Watch(Eagle2(head, model, 20, 3, 4)), 128)
    news, expected = watched(engine, ids, 40)
    state = engine.prefill(ids, 40, Sampling())
    state.width = engine.slots
    reports = [engine.report.tolist()]
    for turn in range(len(news)):
        engine.cycle()
        reports.append(engine.report.tolist())
        count, done, *tokens = reports[turn]
        found.append(engine.drafter.read(tokens[:count]))
    assert done and reports[-1][0] == 0 and found == [None, *expected]
    assert int(engine.drafter.count) == len(expected)  # the cycle after the end does not count
    engine.prefill(ids, 40, Sampling())
    for _ in range(RING + 1):
        engine.cycle()
    engine.drafter.read([0])
    with pytest.raises(RuntimeError, match="cycle 1 is gone"):
        engine.drafter.read([0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(demo: Path, demo_prompts: list[list[int]]) -> None:
    """Fails if a row is read before it is written or overwritten by the cycle that runs meanwhile, if candidates are
    ranked otherwise than by the kernel, if the text changes, or if a graph's records differ from launched kernels'."""
    model = load_model(demo, "cuda", torch.float32)
    head, retrieval = load_head(demo / "eagle", model), Retrieval(6, device="cuda")
    for make in (lambda: Eagle2(head, model), lambda: Eagle2(head, model, 40, 5, 8, retrieval), lambda: Lookup("cuda"),
                 lambda: Lookahead(model)):
        plain = Engine(model, make(), 512)
        graph, launched = (Engine(model, Watch(make(), "cuda"), 512, compiled=c) for c in (True, False))
        for ids in demo_prompts[:2]:
            news, cycles = watched(graph, ids, 60)
            assert news == list(plain.generate(ids, 60)) and (news, cycles) == watched(launched, ids, 60)
            for new, cycle in zip(news[1:], cycles, strict=True):
                path = [0, *cycle["path"]]
                assert [cycle["next"][node] for node in path][:len(new)] == new
    watch = Watch(Eagle2(head, model), "cuda")
    engine = Engine(model, watch, 512)
    engine.prefill(demo_prompts[2], 60, Sampling())
    for _ in range(RING):  # Watch ranked as the kernel did
        engine.cycle()
        row, n = watch.ring[(int(watch.count) - 1) % RING], watch.num_nodes
        assert watch.drafter.candidates.tokens[row[3 + 5 * n:]].equal(row[3:2 + n])


# ----- What is printed -------------------------------------------------------------------------------------------


EVIL = "</script><script>document.title='evil'</script>"
TEXTS = {0: "␣is", 1: "\\n", 2: EVIL, 3: "日本語", 4: "e", 5: "␣" * 40, 6: "\\xe2\\x9c", 7: "◌\u0301", 8: "a&b<i>"}


def made_up(seed: int, nodes: int = 60, confident: bool = True, chain: bool = False) -> dict:
    """A cycle of random tokens of TEXTS, some of them blocked (~t), a random path of them accepted."""
    draw = random.Random(seed)
    parents = [0] + [node - 1 if chain else draw.randrange(node) // 2 for node in range(1, nodes)]
    share = [1.0]
    depth = [0]
    for node in range(1, nodes):
        share.append(round(share[parents[node]] * draw.random(), 4))
        depth.append(depth[parents[node]] + 1)
    tokens = [draw.randrange(9) for _ in parents]
    path = []
    node = draw.choice(range(nodes))
    while node:
        path.insert(0, node)
        node = parents[node]
    leaves = [i for i in range(1, nodes) if i not in parents and i not in path]
    for i in leaves[:3]:
        tokens[i] = ~tokens[i]
    return {"tokens": tokens, "parents": parents, "depth": depth, "next": [draw.randrange(9) for _ in parents],
            "confidence": share if confident else None, "looked_up": leaves[3:5], "path": path,
            "gained": len(path) + (seed % 5 > 0 or not path), "length": 9}


def plain_text(text: str) -> str:
    return re.sub("\x1b\\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [32, 40, 59, 60, 80, 200])
def test_lines(width: int) -> None:
    """Fails if a line is wider than the terminal, if folding loses a node or counts it twice, if an accepted node is
    hidden or a blocked one shown, or if colour changes the text."""
    for seed in range(30):
        cycle = made_up(seed, [60, 2, 17][seed % 3], seed % 2 > 0, seed % 7 == 6)
        cycle["path"] = cycle["path"][:16]
        lines = tree_lines(cycle, TEXTS, 3, width)
        assert [plain_text(line) for line in tree_lines(cycle, TEXTS, 3, width, True)] == lines
        assert all(columns(line) <= width and line == line.rstrip() for line in lines)
        bonus = cycle["gained"] > len(cycle["path"])
        assert lines[0].startswith("cycle 3: ") and len(lines) <= 2 + bonus + max(15, len(cycle["path"]))
        assert lines[0].endswith(", the end") != bonus or width < 50
        nodes = lines[2:len(lines) - bonus]
        real = sum(token >= 0 for token in cycle["tokens"][1:])
        assert len(nodes) + sum(int(n) for line in lines for n in re.findall(r" \+(\d+) more$", line)) == real
        assert sum("─* " in line or "├* " in line or "└* " in line for line in nodes) == len(cycle["path"])
        if bonus:
            assert lines[-1].endswith(" bonus") and "└" in lines[-1] and "+ " in lines[-1]


def test_a_small_tree_exactly() -> None:
    """Fails if what a pipe shows changes: branches, marks, percentages, bars, folding, the path down to the bonus."""
    cycle = {"tokens": [0, 4, 8, 1, 4, 3], "parents": [0, 0, 0, 1, 1, 2], "depth": [0, 1, 1, 2, 2, 2], "gained": 2,
             "next": [4, 3, 0, 0, 0, 0], "confidence": [1, 0.5, 0.25, 0.25, 0.005, 0.1], "looked_up": [3], "path": [1]}
    assert tree_lines(cycle, TEXTS, 1, 80, most=4) == [
        "cycle 1: +2, 1 of 5 drafts accepted",
        "␣is",
        "├── a&b<i>     25% ██▌        +1 more",
        "└─* e          50% █████      +1 more",
        "   ├── \\n      25% ██▌        ~",
        "   └─+ 日本語 bonus"]
    assert "\x1b[" not in "".join(tree_lines(cycle, TEXTS, 1)) and "\x1b[" in tree_lines(cycle, TEXTS, 1, 80, True)[0]


class Letters:
    """A tokenizer whose token t is the byte t, 256 a special token; for View."""
    bpe = SimpleNamespace(id_to_token=lambda i: "<|end|>" if i == 256 else None)

    def __init__(self, words: dict[int, bytes] | None = None) -> None:
        self.words = words or {}

    def token_bytes(self, i: int) -> bytes:
        return self.words.get(i, bytes([i]) if i < 256 else b"")

    def stream(self):
        return SimpleNamespace(push=lambda ids: "".join(map(chr, ids)), flush=lambda: "")


def test_token_text() -> None:
    """Fails if a newline, an escape sequence or half a character reaches the terminal as it is, or if a token shows as
    nothing or like another one."""
    words = {0: b" is", 1: b"\n\n", 2: b"\x1b[2J", 3: "é".encode()[:1], 4: b"a" + "日".encode()[:2], 5: b"\\n",
             6: "\u0301".encode(), 7: "\u202e".encode(), 8: "é日".encode(), 9: b"\t'", 10: "\u00a0".encode()}
    shown = {i: token_text(Letters(words), i) for i in words}
    assert shown == {0: "␣is", 1: "\\n\\n", 2: "\\x1b[2J", 3: "\\xc3", 4: "a\\xe6\\x97", 5: "\\\\n", 6: "◌\u0301",
                     7: "\\u202e", 8: "é日", 9: "\\t'", 10: "\\xa0"}
    assert token_text(Letters(), 256) == "<|end|>" and token_text(Letters(), 300) == "#300"


def test_colour_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if escape sequences go to a file or in spite of NO_COLOR, or if a terminal gets none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = SimpleNamespace(isatty=lambda: True)
    assert draw_tree.wants_colour(terminal) and not draw_tree.wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")
    assert draw_tree.wants_colour(terminal)  # no-color.org: "when present and not an empty string"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not draw_tree.wants_colour(terminal)


def test_answer() -> None:
    """Fails if a token is shown at another depth than it was drafted at, or if colours change the text."""
    cycles = [{"path": [1, 4], "gained": 3}, {"path": [], "gained": 1}, {"path": [2, 3], "gained": 2}]
    pieces = ["A", "b", "c", "D", "E", "f\n", "g"]
    assert draw_tree.draft_depths(cycles) == [0, 1, 2, 0, 0, 1, 2]
    text, legend = answer_text(cycles, pieces, False).split("\n\n")
    assert text == "⟨A⟩bc⟨D⟩⟨E⟩f\ng"
    assert legend == "7 tokens in 3 cycles: 3 of the model's own ⟨⟩; drafted: 2 at depth 1, 2 at depth 2"
    assert plain_text(answer_text(cycles, pieces, True)).startswith("Abc" "DEf\ng\n\n")
    deep = answer_text([{"path": [*range(1, 10)], "gained": 10}], [*"abcdefghijk"], True)
    assert plain_text(deep).startswith("abcdefghijk\n") and "1 at depth 9" in deep, "deeper than there are colours"
    assert answer_text([], ["A"], False) == "⟨A⟩\n\n1 tokens in 0 cycles: 1 of the model's own ⟨⟩"


def test_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if trees, the answer or texts of tokens are lost on the way to JSON, or if trees are printed unasked."""
    model, head = tiny.pair(1, 0.1)
    monkeypatch.setenv("COLUMNS", "50")
    for trees in (True, False):
        engine = Engine(model, Watch(Eagle2(head, model, 20, 3, 4)), 128)
        out = io.StringIO()
        view = View(engine.drafter, Letters({t: b"<%d>" % t for t in range(24)}), trees, out)
        tokens = []
        for new in engine.generate(tiny.prompt(3, 7), 30):
            view.push(new)
            tokens += new
        view.finish()
        record = json.loads(json.dumps(view.record()))
        assert "".join(record["pieces"]) == "".join(map(chr, tokens)) and len(record["pieces"]) == 30
        assert 1 + sum(cycle["gained"] for cycle in record["cycles"]) == 30
        assert all(str(t) in record["texts"] for cycle in record["cycles"] for t in cycle["tokens"] + cycle["next"])
        assert out.getvalue().count("cycle ") == len(record["cycles"]) * trees
        assert out.getvalue().count(draw_tree.LEGEND) == out.getvalue().count(draw_tree.SCORES_LEGEND) == trees
        assert max(map(columns, out.getvalue().split("\n\n")[-3].splitlines() if trees else [""])) <= 50


# ----- The page --------------------------------------------------------------------------------------------------


def run_of(cycles: list[dict]) -> dict:
    pieces = ["A"] + [TEXTS[n % 9].replace("␣", " ") for n in range(sum(cycle["gained"] for cycle in cycles))]
    return {"method": "eagle2", "trees": {"pieces": pieces, "texts": TEXTS, "cycles": cycles}}


def test_page_holds_the_run(tmp_path: Path) -> None:
    """Fails if the page holds another run, if a token can end the script, or if anything is fetched from elsewhere."""
    result = run_of([made_up(seed) for seed in range(5)])
    write_page(result, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = re.search('<script type="application/json" id="run">(.*?)</script>', html, re.S)[1]
    assert json.loads(data) == json.loads(json.dumps(result)) and "<" not in data
    template = html.replace(data, "")
    assert template.count("<script") == template.count("</script") == 2 and "RUN_AS_JSON" not in html
    assert set(re.findall("https?://[^\"' ]+", template)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def browse(html: Path, script: str, tmp_path: Path) -> str:
    """The page's DOM in Chromium after `script`."""
    copy = tmp_path / "copy.html"
    copy.write_text(html.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}")
    done = subprocess.run([CHROMIUM, *quiet, "--window-size=1200,800", "--dump-dom", f"{copy.as_uri()}#4"], timeout=60,
                          capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.is_file(), reason="no Chromium")
def test_page_in_a_browser(tmp_path: Path) -> None:
    """Fails if the script has an error, if a key, a click or a link shows a wrong cycle, or if a token is executed."""
    cycles = [made_up(seed) for seed in range(1, 7)]
    write_page(run_of(cycles), tmp_path / "page.html")
    dom = browse(tmp_path / "page.html", """
        const seen = [], press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        const look = () => seen.push(at("figures").textContent.split(" ")[1]);
        look(); press("Home"); look(); press("ArrowRight"); look(); press("End"); press("ArrowRight"); look();
        press("ArrowLeft"); look(); at("answer").lastChild.click(); look();
        press(" "); const playing = timer !== null; press(" ");
        at("answer").children[1].click(); press("ArrowRight");
        document.body.dataset.seen = seen.join() + "," + playing + "," + (timer === null);""", tmp_path)
    assert 'data-seen="4,1,2,6,5,6,true,true"' in dom and "<title>Cycle by cycle</title>" in dom
    assert "cycle 2 of 6" in dom and "document.title" in dom and dom.count("<script") == 3
    tree = re.search('<div id="tree">(.*?)</div>', dom, re.S)[1]
    real = sum(token >= 0 for token in cycles[1]["tokens"])
    bonus = cycles[1]["gained"] - len(cycles[1]["path"])
    assert tree.count("<rect") == real + bonus and tree.count('<g class="bonus') == bonus
    assert tree.count('<g class="drafted') == len(cycles[1]["path"]) == dom.count('<span class="drafted')


# ----- The command line ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_line(call, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Fails if --show_tree changes the text or its JSON lacks the trees, if --tree_html and app.watch write different
    pages, or if a page that cannot be written or a wrong file ends in a traceback or is found only after the run."""
    size = json.loads((demo / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    model, head = tiny.pair(0, 0.1, torch.float32, vocab_size=size)
    folder = tiny.save_target(model, tmp_path / "model")
    tiny.save_head(head, folder / "eagle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    words = ("--checkpoint", folder, "--prompt", "Name three colours.", "--max_new_tokens", 20, "--dtype", "float32",
             "--device", "cpu", "--json")
    html, again, saved = tmp_path / "a.html", tmp_path / "b.html", tmp_path / "run.json"
    code, out, _ = call(*words, "--eagle2", "--show_tree", "--tree_html", html)
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["gained"] == [cycle["gained"] for cycle in result["trees"]["cycles"]]
    assert "".join(result["trees"]["pieces"]) == result["text"] and "cycle 1: " in out and "\x1b" not in out
    assert out.startswith(draw_tree.LEGEND)  # the text is not streamed between the trees
    saved.write_text(out, encoding="utf-8")
    watch_module.page_of(saved, again)
    assert again.read_bytes() == html.read_bytes()
    code, out, _ = call(*words, "--eagle2", "--tree_html", html)
    assert json.loads(out.splitlines()[-1])["trees"] == result["trees"] and "cycle 1" not in out.splitlines()[0]
    plain = call(*words, "--eagle2")[1]
    assert plain.rpartition("\n{")[0] == out.rpartition("\n{")[0]  # the same text streamed
    assert json.loads(plain.splitlines()[-1]).keys() == result.keys() - {"trees"}
    for options, message in ((["--show_tree"], "--eagle2"), (["--eagle2", "--tree_html", tmp_path / "x/y.html"], "x/y"),
                             (["--eagle2", "--tree_html", tmp_path], str(tmp_path))):
        code, out, err = call(*words, *options)
        assert code == 2 and message in err and "Traceback" not in err and out == ""
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    for name, code in (("new.html", 2), (html.name, 0)):  # a file that is there may be written
        given, out, err = call(*words, "--eagle2", "--tree_html", tmp_path / name)
        assert given == code and ("no permission to write there" in err) == bool(code) and bool(out) == (code == 0)
    for text in ("", "{}", "[1]", "no JSON", "[" * 100_000, json.dumps({"method": "vanilla"})):
        saved.write_text(text)
        with pytest.raises(ValueError, match="run.json: not what"):
            watch_module.page_of(saved, again)
