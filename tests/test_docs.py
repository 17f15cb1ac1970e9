"""The pages: their commands can be typed, their links lead somewhere, and the drafter that one of them writes works.

`python bench.py` and its like are parsed by the command's own parser, which is stopped before it does anything.
"""
import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import load_file

import drafters
import generate
from app.options import check_methods
from draft import Vanilla
from drafters import methods
from drafters.heads import load_head
from drafters.methods import METHODS, make_drafter
from engine import Engine
from model import load_model
from quantize import quantize_draft
from sampling import Sampling
from tree import State

PAGES = sorted(page.relative_to(ROOT).as_posix() for page in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
OWN_DRAFTER = TEXTS["docs/your_own_drafter.md"]
ELSEWHERE = {"drafters/bigram.py", "pydoc_data/topics.py"}  # the reader writes the one, Python has the other
# Files of an earlier layout. Some names live on in a folder: only the bare name is out of date.
FORMER_NAMES = (
    "kernels", "tree_kernels", "linears", "qlinears", "quantizers", "autotree", "profiling", "timing", "drafter",
    "baselines", "tensor_files", "train_peers", "cycle", "watch", "workload", "widen", "methods", "memory")


def code_blocks(text: str, language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for name, content in blocks if name == language]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


# ----- Commands ------------------------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every `python ...` in a code block or between backticks."""
    for page, text in TEXTS.items():
        blocks = "".join(code_blocks(text)).replace("\\\n", " ")
        spans = "\n".join(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", without_code(text)))
        for line in (blocks + spans).splitlines():
            found = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?python3? (.*)", line)
            if found and not found[1].startswith("-m pytest"):
                yield page, found[1]


class Parsed(BaseException):
    """The command's parser took the words. Its one argument is what became of them, a Namespace."""


def parse(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command as far as its parser gets. Raises Parsed; SystemExit for words that it does not take."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *args: object) -> None:
        raise Parsed(parse_args(parser, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [name, *words])
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__")


@pytest.mark.parametrize("page, command", sorted(set(commands())), ids=str)
def test_command(page: str, command: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fails if a page names a command that does not exist, or an option or value that it does not take."""
    if page == "docs/your_own_drafter.md":
        request.getfixturevalue("bigram")  # the page has added a row
    words = shlex.split(command, comments=True)
    name, *words = words[1:] if words[0] == "-m" else words
    file = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    assert file.is_file(), f"{page}: there is no {name}"
    options = [word for word in words if word.startswith("--")]
    if "argparse" not in file.read_text(encoding="utf-8"):
        assert not options, f"{page}: {name} takes no options"
        return
    named = not words or "..." in words or words == ["--help"]  # and not shown in full
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown), monkeypatch.context() as patch:
        try:
            parse(name, ["--help"] if named else words, patch)
        except Parsed as parsed:
            args = parsed.args[0]
        except SystemExit:
            assert named, f"{page}: {name} does not take this:\n{shown.getvalue()}"
            assert set(options) <= set(re.findall(r"--\w+", shown.getvalue())), page
            return
    # Two commands also refuse options that do not fit together:
    if name == "generate.py":
        generate.parse_args(words)
    if name == "bench.py" and words[0] not in ("compare", "card"):
        assert not check_methods(args, args.methods), page


def test_there_are_commands() -> None:
    """Fails if the pattern that finds commands no longer finds those of the pages."""
    found = [name for _, command in commands() for name in command.split()[:2]]
    expected = {"generate.py", "quantize.py", "train.py", "bench.py", "convert_hf_checkpoint.py", "benchmarks.cycle",
                "benchmarks.quality", "training.peers", "app.watch"}
    assert expected <= set(found)
    lines = sum(len(re.findall(r"^(?:\.venv/bin/)?python ", text, re.MULTILINE)) for text in TEXTS.values())
    in_tests = sum(len(re.findall(r"^python -m pytest", text, re.MULTILINE)) for text in TEXTS.values())
    assert len(list(commands())) >= lines - in_tests > 20


@pytest.mark.parametrize("command", [
    "generate.py --checkpoint x --prompt y --eagle4", "bench.py --checkpoint x --shape llama-9",
    "train.py --tokens 24e6", "quantize.py --checkpoint x --mode int3"])
def test_a_wrong_command_is_found(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if `parse` accepts an unknown option, an unknown value, or a required option that is missing."""
    name, *words = command.split()
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        parse(name, words, monkeypatch)


# ----- Names and links -----------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    """Fails if a link leads to a file or a heading that does not exist."""
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", TEXTS[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: there is no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", without_code(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page}: {target} has no heading {anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files(page: str) -> None:
    """Fails if a page names a source file, a page or a folder that does not exist."""
    for name in re.findall(r"`([\w./-]+)`", without_code(TEXTS[page])):
        if name.endswith((".py", ".md", ".toml", ".png", "/")) and name not in ELSEWHERE:
            assert (ROOT / name).exists(), f"{page}: there is no {name}"


@pytest.mark.parametrize("page", PAGES)
def test_former_names(page: str) -> None:
    """Fails if a page names a file of the earlier layout."""
    assert not re.findall(rf"(?<![\w/])(?:{'|'.join(FORMER_NAMES)})\.py\b", TEXTS[page])


@pytest.mark.slow
def test_readme() -> None:
    """Fails if README grows past what a newcomer reads, or a number that is filled in has lost one of its marks."""
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 170
    marks = re.findall(r"<!-- (number: \w+|end) -->", text)
    assert all(mark.startswith("number") for mark in marks[::2]) and set(marks[1::2]) <= {"end"}
    assert len(set(marks[::2])) == len(marks[1::2])
    assert {f"`{folder.name}/`" for folder in ROOT.iterdir() if (folder / "__init__.py").exists()} <= set(
        re.findall(r"`\w+/`", text)), "a folder is missing in README's table"


# ----- Your own drafter ----------------------------------------------------------------------------------------------


@pytest.fixture
def bigram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type:
    """The page's drafter as drafters/bigram.py, and its row in the table."""
    file, *row = code_blocks(OWN_DRAFTER, "python")
    (tmp_path / "bigram.py").write_text(file, encoding="utf-8")
    monkeypatch.setattr(drafters, "__path__", [*drafters.__path__, str(tmp_path)])
    monkeypatch.setitem(METHODS, "bigram", None)
    try:
        exec("\n".join(row), dict(vars(methods)))
        yield import_module("drafters.bigram").Bigram
    finally:
        sys.modules.pop("drafters.bigram", None)
        vars(drafters).pop("bigram", None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_your_own_drafter_on_a_gpu(bigram: type, demo: Path, demo_prompts: list[list[int]]) -> None:
    """Fails if the page's drafter cannot be captured in a CUDA graph, or if a replay does not see the newer text."""
    model = load_model(demo, "cuda", torch.float32)
    mine, vanilla = (Engine(model, drafter, 512, frozenset([2])) for drafter in (bigram("cuda", 512), Vanilla("cuda")))
    longest = 0
    for ids in demo_prompts[:6]:
        steps = list(mine.generate(ids, 64))
        assert sum(steps, []) == sum(vanilla.generate(ids, 64), [])
        longest = max(longest, *map(len, steps))
    assert longest > 1  # a draft was accepted


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--bigram"], ["--method", "bigram"]], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_your_own_drafter(bigram: type, flags: list[str], sampling: Sampling, tmp_path: Path) -> None:
    """Fails if the page's drafter or its row does not work as they stand there: by either flag it must be made, write
    the text of plain decoding, and have drafts accepted."""
    model = tiny.pair(0, 0.1)[0]  # its next token depends mostly on the last one: a bigram repeats itself
    args = generate.parse_args(["--checkpoint", str(tmp_path), "--prompt", "x", "--device", "cpu", *flags])
    assert args.method == "bigram"
    drafter = make_drafter("bigram", args, model, 128)
    assert type(drafter) is bigram and len(METHODS["bigram"].help) > 9
    ids = tiny.prompt(1, 40)
    steps = list(Engine(model, drafter, 128).generate(ids, 60, sampling))
    assert sum(steps, []) == sum(Engine(model, Vanilla(), 128).generate(ids, 60, sampling), [])
    if not sampling.temperature:
        assert max(map(len, steps)) == drafter.max_depth + 1  # a whole chain was right


@pytest.mark.slow
def test_your_own_drafter_on_the_command_line(bigram: type, call, tmp_path: Path) -> None:
    """Fails if something that the page promises for a new row does not work with it: --memory, which builds the drafter
    without memory, --compare, --show_tree."""
    words = ["--checkpoint", tiny.save_everything(tmp_path / "x"), "--device", "cpu", "--dtype", "float32", "--bigram"]
    code, out, _ = call(*words, "--memory")
    assert code == 0 and "GB" in out
    code, _, err = call(*words, "--prompt", "la la la la", "--max_new_tokens", 12, "--compare", "--show_tree")
    assert code == 0 and "identical tokens" in err and "bigram" in err


@pytest.mark.slow
def test_your_own_drafter_proposes_what_followed(bigram: type) -> None:
    """Fails if the page's drafter is a token off, which its text would not show."""
    text = [5, 1, 2, 3, 4, 9, 7, 1, 6, 8, 5, 2, 9, 1]
    tokens = torch.zeros(161, dtype=torch.int64)
    tokens[:len(text)] = torch.tensor(text)
    state = State(tokens, torch.tensor(len(text)), torch.zeros(5, 2), torch.tensor(1), torch.tensor(False), 160)
    tree = bigram("cpu", 32).propose(state)
    assert tree.tokens.tolist() == [1, 6, 8, 5, 2] and tree.parents.tolist() == [0, 0, 1, 2, 3]
    state.length.fill_(13)  # 9 stood at position 5
    assert bigram("cpu", 32).propose(state).tokens.tolist() == [9, 7, 1, 6, 8]


def test_your_own_drafter_reads_nothing_on_the_host(bigram: type) -> None:
    """Fails if the page's drafter reads a value on the host, which no CUDA graph can: tensors on the meta device have
    none."""
    zero = torch.zeros((), dtype=torch.int64, device="meta")
    state = State(torch.zeros(161, dtype=torch.int64, device="meta"), zero, zero, zero, zero, 160)
    assert bigram("meta", 32).propose(state).tokens.shape == (5,)


@pytest.mark.parametrize("ids", [None, [20, 3, 4, 5, 11]])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("file", ["model.safetensors", "model-int8.safetensors"])
def test_a_head_for_other_engines(file: str, shared: bool, ids: list[int] | None, tmp_path: Path, monkeypatch) -> None:
    """Fails if the copy that the page makes has other weights than the head, if its lm_head is not the model's where
    the head has none, or if it is no published head."""
    model = tiny.target(dtype=torch.bfloat16)
    head = tiny.head3(model, ids=ids)
    if shared:
        head.lm_head = None
    folder = tiny.save_target(model, tmp_path / "x")
    source, out = tiny.save_head3(head, folder / "eagle3"), tmp_path / "out"
    quantize_draft(source, folder, "int8", 128)
    page = TEXTS["docs/other_engines.md"]
    [code] = [block for block in code_blocks(page, "python") if "save_eagle3" in block]
    monkeypatch.setattr(sys, "argv", ["x", str(source / file), str(folder), str(out)])
    exec(code, {})
    made = load_file(out / "model.safetensors")
    assert "share_lm_head" not in json.loads((out / "config.json").read_text()) and "lm_head.weight" in made
    copy = load_head(out, model)
    assert copy.cfg == head.cfg and (copy.vocab is None if ids is None else copy.vocab.tolist() == ids)
    rows = model.lm_head.weight if ids is None else model.lm_head.weight[ids]
    assert not shared or torch.equal(copy.lm_head.weight, rows)
    for name, weight in head.state_dict().items():
        error = (copy.state_dict()[name].float() - weight.float()).norm() / weight.float().norm()
        assert error < (0.02 if "int8" in file else 1e-9), name


def test_readme_shows_the_same_drafter() -> None:
    """Fails if README's taste of a drafter is not the `propose` of the page."""
    taste = next(block for block in code_blocks(TEXTS["README.md"], "python") if "class Bigram" in block)
    lines = [re.sub(r"\s+#.*", "", line) for line in taste.splitlines()[1:]]
    page = [re.sub(r"\s+#.*", "", line) for line in OWN_DRAFTER.splitlines()]
    assert set(lines) <= set(page)
