"""The order of the house, read from its source: who may import whom, how names are chosen, how long things may be.

Nothing is run: the imports are those that `ast` finds, within functions too. tests/ itself is bound only by
`test_tests_do_not_import_tests`.
"""
import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

from drafters.methods import METHODS

COMMANDS = ("generate", "convert_hf_checkpoint", "quantize", "train", "bench")
ENGINE = ("engine", "draft", "tree", "model", "sampling", "tokenizer")  # the six files to read first
ROOMS = ("ops", "quant", "formats", "drafters", "app", "training", "benchmarks")

# A file or room may import those on the lines above its own. Names on one line do not import each other, but the files
# of one room do.
ORDER = [
    ("tree", "formats"),
    ("ops",),
    ("sampling", "tokenizer", "quant"),
    ("model",),
    ("draft",),
    ("engine",),
    ("drafters",),
    ("app",),
    ("training",),
    ("generate", "convert_hf_checkpoint", "train", "quantize", "benchmarks"),
    ("bench",),
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}

NEWER_STDLIB = {"annotationlib", "compression", "profiling"}  # new in Python 3.14 and 3.15
HUGGING_FACE = {"kernels"}  # transformers imports this package if it finds one of the name
TAKEN_BUT_OURS = {"tree"}  # dm-tree's import name: nothing that runs here uses dm-tree

MAX_LINES = 350
MAX_LINES_OF_A_COMMAND = 220
MAX_LINES_OF_THE_ENGINE = 1450  # the six files together
MAX_LINES_OF_A_FUNCTION = 60


def python_files() -> dict[str, Path]:
    """All source files but the tests, by the name they are imported by. Hidden folders do not count."""
    files = {path.stem: path for path in ROOT.glob("*.py")}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if len(parts) > 1 and parts[0] != "tests" and not any(part.startswith(".") for part in parts):
            files[".".join(parts)] = path
    return files


FILES = python_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
TOP_NAMES = sorted({name.partition(".")[0] for name in FILES})


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, as dotted names. `from a import b` gives a and a.b, which may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def arrows() -> dict[str, set[str]]:
    """Which of our files each file imports."""
    return {name: {other for other in imported(tree) if other in FILES and other != name}
            for name, tree in TREES.items()}


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


# ----- Imports ---------------------------------------------------------------------------------------------------


def test_imports_follow_the_order() -> None:
    """Fails if a file imports something that stands above it, or beside it in another room: ops a model, formats the
    kernels, one command another."""
    wrong = []
    for name, others in arrows().items():
        room = name.partition(".")[0]
        for other in others:
            other_room = other.partition(".")[0]
            if other_room != room and LEVEL[other_room] >= LEVEL[room]:
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_import_cycles() -> None:
    """Fails if files import each other in a circle, be it within one room or by an import inside a function."""
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as e:
        pytest.fail(f"a circle of imports: {' <- '.join(e.args[1])}")


@pytest.mark.slow
def test_tests_do_not_import_tests() -> None:
    """Fails if a test file imports another one: what tests share is in helpers.py, tiny.py and conftest.py."""
    files = list((ROOT / "tests").rglob("*.py"))
    tests = {path.stem for path in files if path.name.startswith("test_")}
    for path in files:
        parts = {part for name in imported(ast.parse(path.read_text(encoding="utf-8"))) for part in name.split(".")}
        assert not parts & tests, path


def test_imports_are_seen() -> None:
    """Fails if `imported` overlooks a way to import: the tests above would pass whatever is imported."""
    source = "import a.b\nfrom c import d as e\ndef f():\n    if e:\n        from g import h, i\n        import j\n"
    assert set(imported(ast.parse(source))) == {"a.b", "c", "c.d", "g", "g.h", "g.i", "j"}
    graph = arrows()
    assert {"tree", "model", "draft", "ops.linear"} <= graph["engine"] and "app.chat" in graph["generate"]
    assert "drafters.methods" in graph["app.options"] and not graph["tree"]


# ----- Names -----------------------------------------------------------------------------------------------------


def test_what_lies_at_the_top() -> None:
    """Fails if a file or a room is added at the top, where every name may hide somebody else's module."""
    files = {name for name in FILES if "." not in name}
    assert files == {*COMMANDS, *ENGINE}
    assert set(TOP_NAMES) - files == set(ROOMS)
    assert set(LEVEL) == set(TOP_NAMES)


def test_no_name_is_taken() -> None:
    """Fails if a file at the top or a room has the name of a module of Python or of an installed package: Python would
    import ours in its place. A file kernels.py once broke transformers in that way."""
    taken = sys.stdlib_module_names | NEWER_STDLIB | HUGGING_FACE | set(packages_distributions()) - TAKEN_BUT_OURS
    assert not taken & set(TOP_NAMES)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_is(room: str) -> None:
    """Fails if a room's __init__.py is missing (a namesake that is installed could win), is more than one line of
    docstring, or if there are folders in the room."""
    tree = TREES[f"{room}.__init__"]
    docstring = ast.get_docstring(tree, clean=False)
    assert docstring and "\n" not in docstring and docstring.endswith(".") and len(tree.body) == 1
    assert all(name.count(".") == 1 for name in FILES if name.startswith(f"{room}."))


# ----- One table of methods --------------------------------------------------------------------------------------

METHOD_NAMES = {*METHODS, *(part for name in METHODS for part in name.split("+"))}


def names_a_method(node: ast.AST | None) -> bool:
    """True for the name of a method, and for a tuple, list or set with one in it."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return any(names_a_method(item) for item in node.elts)
    return isinstance(node, ast.Constant) and node.value in METHOD_NAMES


def decisions_by_name(tree: ast.AST) -> list[int]:
    """Lines that compare something with the name of a method: by ==, in, startswith, endswith or match."""
    found = []
    for node in ast.walk(tree):
        operands: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("startswith", "endswith", "removeprefix", "partition"):
                operands = list(node.args)
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        if any(map(names_a_method, operands)):
            found.append(operands[0].lineno)
    return found


def test_methods_are_decided_on_in_the_table() -> None:
    """Fails if a command, the app, the benchmarks or training ask for a method by its name, where a new row of
    drafters/methods.py would be forgotten."""
    wrong = [f"{FILES[name].relative_to(ROOT)}:{line}" for name, tree in TREES.items()
             if name in COMMANDS or name.startswith(("app.", "benchmarks.", "training."))
             for line in decisions_by_name(tree)]
    assert not wrong


def test_decisions_are_seen() -> None:
    """Fails if `decisions_by_name` overlooks one of the ways to compare, or takes a key or a path for one."""
    for source in ('m == "eagle2"', '"lookup" in m', 'm in ("x", "medusa")', 'm.startswith("speculate")',
                   'match m:\n    case "vanilla":\n        pass', 'm != "speculate+lookup"', 'm == "rejection" or x'):
        assert decisions_by_name(ast.parse(source)), source
    for source in ('results["vanilla"]', 'folder / "eagle"', 'm == BASELINE', '{"eagle2": 1}', 'm == "eagle4"'):
        assert not decisions_by_name(ast.parse(source)), source


# ----- Lengths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_length_of_files(name: str) -> None:
    """Fails if a file or one of its functions is longer than what one reads at a time."""
    assert lines(FILES[name]) <= (MAX_LINES_OF_A_COMMAND if name in COMMANDS else MAX_LINES)
    for node in ast.walk(TREES[name]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_LINES_OF_A_FUNCTION, f"{node.name} is too long"


def test_length_of_the_engine() -> None:
    """Fails if the six files that are the engine grow beyond what one reads in an hour."""
    assert sum(lines(FILES[name]) for name in ENGINE) <= MAX_LINES_OF_THE_ENGINE


@pytest.mark.xdist_group("seen")
def test_groups_are_seen(request: pytest.FixtureRequest) -> None:
    """Fails if pytest-xdist does not see its groups, as version 3.8.0 with pytest 9.2: then each worker makes the demo
    model's texts, and compiles what other cards share."""
    assert not request.config.getoption("loadgroup", False) or request.node.nodeid.endswith("@seen")
