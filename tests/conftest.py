"""What all tests share: one thread for tiny tensors, the demo model and what it wrote, and the command line.

`make test` prepares the demo model. DEMO_CHECKPOINT=FOLDER names another converted folder with a head in eagle/.
The project is imported within the fixtures, so that collecting a few tests stays fast.
"""
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_TREE = (8, 3, 3)  # nodes, levels and top-k: small, as a CPU likes it

PROMPTS = [
    "What should I pack for a weekend in the mountains?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "If a train travels 180 km in 3 hours, how far does it go in 5 hours? Explain step by step.",
    "List ten animals that live in the sea.",
    "Tell me a short story about a lighthouse keeper and a lost whale.",
    "Translate into French: Where is the nearest train station?",
    "Explain to a child why the sky is blue.",
    "Write a polite email that asks my landlord to repair the heating.",
    "What is the difference between a virus and a bacterium?",
    "Give me a recipe for vegetable soup with exact quantities.",
    "Summarise the plot of Romeo and Juliet in three sentences.",
    "Which is larger, 3/4 or 5/7? Show the calculation.",
    "Write an SQL query that counts the orders of each customer in 2023.",
    "Compose four lines of verse about autumn rain.",
    "Rewrite this in plain English: the party of the first part shall indemnify the party of the second part.",
    "Name three advantages and three disadvantages of working from home.",
]

os.environ.setdefault("TRITON_INTERPRET", "0")  # ops/device.py imports Triton then, without a GPU too
torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
gc.disable()  # until all files are imported: what they define stays, and the collector would go through it many times


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@contextmanager
def all_cores() -> Iterator[None]:
    """Use this process's share of the cores: the demo model's matrices are large enough for more than one thread."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    try:
        yield
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The converted SmolLM2-135M-Instruct with its draft head in eagle/."""
    folder = Path(os.environ.get("DEMO_CHECKPOINT", DEMO))
    if not folder.is_dir():
        pytest.skip(f"no demo model at {folder}: `make demo` makes it, DEMO_CHECKPOINT names another folder")
    return folder


@pytest.fixture(scope="session")
def demo_model(demo: Path):
    """The demo model in fp32. Tests share it: nothing of it changes but its cache."""
    from model import load_model
    return load_model(demo, dtype=torch.float32)


@pytest.fixture(scope="session")
def demo_head(demo: Path, demo_model):
    from drafters.heads import load_head
    return load_head(demo / "eagle", demo_model, 0)


@pytest.fixture(scope="session")
def demo_prompts(demo: Path) -> list[list[int]]:
    """The ids of PROMPTS in the chat template."""
    from tokenizer import Tokenizer
    tokenizer = Tokenizer(demo)
    return [tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS]


@pytest.fixture(scope="session")
def demo_runs(demo_model, demo_head, demo_prompts):
    """Half of the prompts continued greedily by 36 tokens with EAGLE-2's tree DEMO_TREE: [(cycles, all ids, Recorder)].

    Tests that use it belong to the xdist_group "demo": with --dist loadgroup one worker runs them, and makes it once.
    """
    from recorder import Recorder

    from draft import Eagle2
    from engine import Engine
    runs = []
    with all_cores():
        for ids in demo_prompts[:len(PROMPTS) // 2]:
            recorder = Recorder(Eagle2(demo_head, demo_model, *DEMO_TREE))
            engine = Engine(demo_model, recorder.drafter, 512, frozenset([2]))
            cycles = list(engine.generate(ids, 36))
            runs.append((cycles, ids + sum(cycles, []), recorder))
    return runs


@pytest.fixture(scope="session")
def interpreter(request: pytest.FixtureRequest):
    """Check that the tests of a file that are marked `interpreted` pass. One process runs those of all files that are
    tested: to import torch and Triton takes it longer than most of the tests. With --dist loadgroup one worker starts
    it."""
    pytest.importorskip("triton")
    from triton_tools import run_interpreted
    files = {item.path for item in request.session.items if item.originalname == "test_in_the_interpreter"}
    printed, ends = run_interpreted(sorted(files))

    def check(file: str) -> None:
        name = Path(file).relative_to(ROOT).as_posix()
        assert set(ends.get(name, [])) == {"PASSED"}, printed[-12000:]
    return check


@pytest.fixture
def checkpoint(tmp_path: Path):
    """The folder of a tiny target with an EAGLE head and Medusa heads, which is its own draft model; and the target."""
    import tiny

    from drafters.medusa import MedusaHeads, save_medusa
    model, head = tiny.pair(0, 0.1, torch.float32)
    folder = tiny.save_target(model, tmp_path / "target")
    tiny.save_head(head, folder / "eagle")
    tiny.save_head3(tiny.head3(model), folder / "eagle3")
    tiny.save_block(tiny.block(model), folder / "block")
    save_medusa(MedusaHeads(model.cfg.hidden_size, 4), folder / "medusa")
    return folder, model


@pytest.fixture
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run generate.py's command line in this process: (exit code, stdout, stderr)."""
    import generate
    cores = all_cores if "demo" in request.fixturenames else nullcontext  # a tiny model's threads only wait

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, words)])
        code = 0
        try:
            with cores():
                generate.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        out, err = capsys.readouterr()
        return code, out, err
    return call
