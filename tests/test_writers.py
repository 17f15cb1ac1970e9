"""Everything that writes a file, killed before each of its steps, and stopped there while another of its kind writes.

    python -m pytest tests/test_writers.py

The writers run in forked children: importing torch in a process of its own would take seconds. A fork takes half a
second itself where many tests have run, so one child makes all steps.
"""
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from published import head_folder, hf_folder
from safetensors.torch import save_file
from tqdm import tqdm

from app.chat_file import read_messages, write_messages
from app.install import add_head
from convert_hf_checkpoint import convert
from drafters import tree_size
from drafters.heads import load_head
from drafters.medusa import MedusaHeads, load_medusa, save_medusa
from formats.eagle import read_vocab, save_head, save_vocab
from formats.writing import carry_out, held, locked, replace_files, replace_when_whole, write_text
from model import load_model
from quantize import quantize_checkpoint
from tokenizer import Tokenizer
from training.peers import save_draft_model
from training.trainer import Trainer

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # its thread would hold a lock in the children
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "fcntl.flock"}
REFUSED = 3


class Trained(torch.nn.Linear):
    """What a Trainer trains, as far as its state is written and read."""
    cfg = "its config"

    def __init__(self, width: int) -> None:
        super().__init__(width, 2)


def begin(write: Callable[[], object], before_step: Callable[[], object] = lambda: None) -> int:
    """Fork a child that runs `write`, and `before_step` before each of its changes of the disk. Returns its id. Its
    exit code is 0, REFUSED if another run is writing, or 1 for any other error."""
    child = os.fork()
    if child:
        return child
    waiting = True

    def watch(event: str, details: tuple) -> None:
        nonlocal waiting
        writes = event == "open" and isinstance(details[2], int) and details[2] & (os.O_WRONLY | os.O_RDWR)
        if waiting and (event in CHANGES or writes):
            waiting = False  # what it changes itself is no step
            before_step()
            waiting = True

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    held.clear()  # the locks are the parent's
    sys.addaudithook(watch)
    try:
        write()
    except BaseException as error:
        os._exit(REFUSED if is_refusal(error) else 1)
    os._exit(0)


def is_refusal(error: BaseException) -> bool:
    return isinstance(error, (ValueError, OSError)) and "another run is writing" in str(error)


def finish(child: int) -> int:
    """The exit code of a child; minus the signal's number if one has ended it, or stopped it."""
    status = os.waitpid(child, os.WUNTRACED)[1]
    return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)


def files(folder: Path) -> dict[str, bytes]:
    """The contents of all files but those in scratch folders, by their paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".part" not in str(path.relative_to(folder))}


def without_quantized(content: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in content.items() if "model-int" not in name}


# ----- The writers -------------------------------------------------------------------------------------------------


class Writer:
    """One way to write into a folder: `write(folder, i)` writes the i-th of two contents, `load(folder)` raises where
    nothing can be loaded. `prepare(folder)` makes what has to be there before. cleans: removes the scratch files that
    killed runs left."""

    def __init__(self, write: Callable, load: Callable, prepare: Callable = lambda folder: folder.mkdir(),
                 cleans: bool = True) -> None:
        self.write = write
        self.load = load
        self.prepare = prepare
        self.cleans = cleans


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, two heads and a converted checkpoint to write from."""
    folder = tmp_path_factory.mktemp("sources")
    for i, family in enumerate(("llama", "qwen3")):
        hf_folder(folder / f"model{i}", family)
    (folder / "model1/chat_template.jinja").unlink()
    (folder / "model1/tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    head_folder(folder / "head0", "bin")
    head_folder(folder / "head1")
    (folder / "head1/config.json").write_text((folder / "head1/config.json").read_text() + "\n")
    tiny.save_target(tiny.target(0, torch.float32), folder / "target")
    return folder


def writers(sources: Path) -> dict[str, Writer]:
    target = tiny.target(0, torch.float32)
    heads = [tiny.head(target, seed) for seed in (1, 2)]
    medusa = [MedusaHeads(32, count, vocab_size=24) for count in (1, 2)]
    state = [SimpleNamespace(step=i, seconds=0.0, module=Trained(2), optimizers=[], folders=(), export=lambda: None)
             for i in range(2)]
    peers = [SimpleNamespace(layers=target.layers[:count], norm=target.norm) for count in (1, 2)]
    curves = [{"key": [float(i + 1)] * 9} for i in range(2)]

    def make_model(folder: Path) -> None:
        shutil.copytree(sources / "target", folder)

    def make_changing(folder: Path, i: int) -> None:  # what quantize.py reads may have changed between two runs
        torch.manual_seed(i)
        quantize_checkpoint(folder, "int8", 128, "cpu")

    def load_all(folder: Path) -> None:
        load_model(folder)
        Tokenizer(folder)

    def write_curve(folder: Path, i: int) -> None:
        with replace_when_whole(folder / "trees.json") as part:
            part.write_text(json.dumps(curves[i]))

    return {
        "convert": Writer(lambda out, i: convert(sources / f"model{i}", out), load_all),
        "eagle": Writer(lambda out, i: add_head(sources / f"head{i}", out),
                        lambda out: load_head(out / "eagle", load_model(out)),
                        lambda out: convert(sources / "model0", out)),
        "quantize": Writer(make_changing, lambda out: load_model(out / "model-int8.safetensors"), make_model),
        "save_head": Writer(lambda out, i: save_head(heads[i].cfg, heads[i].state_dict(), out),
                            lambda out: load_head(out, target)),
        "medusa": Writer(lambda out, i: save_medusa(medusa[i], out), lambda out: load_medusa(out, target)),
        "draft_model": Writer(lambda out, i: save_draft_model(peers[i], sources / "target", out, bool(i)),
                              lambda out: (out / "model.safetensors").read_bytes()),
        "state": Writer(lambda out, i: Trainer.save(state[i], out), lambda out: torch.load(out / "state.pt")),
        "vocab": Writer(lambda out, i: save_vocab(torch.arange(12 + i), out, 24),
                        lambda out: read_vocab(out / "draft_vocab.json", 24, None)),
        "chat": Writer(lambda out, i: write_messages(out / "chat.json", [{"role": "user", "content": str(i)},
                                                                         {"role": "assistant", "content": "x" * 9999}]),
                       lambda out: read_messages(out / "chat.json"), cleans=False),
        "trees": Writer(write_curve, lambda out: json.loads((out / "trees.json").read_text()), cleans=False)}


NAMES = ("convert", "eagle", "quantize", "save_head", "medusa", "draft_model", "state", "vocab", "chat", "trees")


@pytest.fixture
def writer(request: pytest.FixtureRequest, sources: Path) -> Writer:
    return writers(sources)[request.param]


def contents(writer: Writer, folder: Path) -> list[dict[str, bytes]]:
    """What a folder holds after each of the two contents was written into it alone."""
    found = []
    for i in range(2):
        writer.prepare(folder / f"alone{i}")
        writer.write(folder / f"alone{i}", i)
        found.append(files(folder / f"alone{i}"))
    return found


# ----- Killed and raced --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("writer", NAMES, indirect=True)
def test_killed_before_any_step(writer: Writer, tmp_path: Path) -> None:
    """Fails if a run that is killed leaves a folder that loads and is neither the old nor the new one, or one into
    which the next run does not write the new one and nothing else. What it leaves is what is there when it is killed:
    a copy of the folder before each step. One run is killed, half-way, to see that."""
    old, new = contents(writer, tmp_path)
    is_model = without_quantized(old) == old and {"model.safetensors", "eagle/config.json"} & old.keys() == {
        "model.safetensors"}
    if is_model:
        (tmp_path / "alone0/model-int8.safetensors").write_bytes(b"of the old model")
    for name in ("whole", "killed"):
        shutil.copytree(tmp_path / "alone0", tmp_path / name)
    before, left = files(tmp_path / "whole"), tmp_path / "left"
    state_alone = {name: data for name, data in new.items() if name != "exported"}  # see training/exported.py

    def copy() -> None:
        shutil.copytree(tmp_path / "whole", left / str(len(os.listdir(left)) + 1))

    def kill(steps: Iterator[int] = itertools.count(1)) -> None:
        if next(steps) == middle:
            os.kill(os.getpid(), signal.SIGKILL)

    left.mkdir()
    assert finish(begin(lambda: writer.write(tmp_path / "whole", 1), copy)) == 0
    assert files(tmp_path / "whole") == new and len(os.listdir(left)) > 1
    middle = len(os.listdir(left)) // 2 + 1
    assert finish(begin(lambda: writer.write(tmp_path / "killed", 1), kill)) == -signal.SIGKILL
    assert files(tmp_path / "killed") == files(left / str(middle))
    for folder in (tmp_path / "killed", *left.iterdir()):
        after = files(folder)
        try:
            writer.load(folder)
        except (ValueError, OSError):
            assert len(new) > 1, "one file is always there"
        else:
            assert after in (before, without_quantized(before), new, state_alone), folder.name
        writer.write(folder, 1)
        assert files(folder) == new and not (writer.cleans and [*folder.rglob(".*part")]), folder.name


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["convert", "eagle", "quantize", "state", "chat"], indirect=True)
def test_stopped_while_another_writes(writer: Writer, tmp_path: Path) -> None:
    """Fails if two runs into one folder mix their files, break each other, or both end with an error."""
    both = contents(writer, tmp_path)
    writer.prepare(tmp_path / "prepared")
    turn = steps = 0

    def folder(turn: int) -> Path:
        return tmp_path / f"raced{turn}"

    def write_again() -> None:
        """Write into one folder after the other; in the n-th one, stop before the n-th step."""
        nonlocal turn, steps
        while steps >= turn:  # the last one has as many steps
            turn, steps = turn + 1, 0
            writer.write(folder(turn), 0)

    def stop() -> None:
        nonlocal steps
        steps += 1
        if steps == turn:
            os.kill(os.getpid(), signal.SIGSTOP)

    shutil.copytree(tmp_path / "prepared", folder(1))
    first, stops, allowed = begin(write_again, stop), 0, both[:1]
    while (code := finish(first)) == -signal.SIGSTOP:
        assert not stops or files(folder(stops)) in allowed, stops
        stops, allowed = stops + 1, both[:1]
        try:
            writer.write(folder(stops), 1)
        except (ValueError, OSError) as error:
            assert is_refusal(error), stops
        else:
            assert files(folder(stops)) == both[1], stops
            allowed = both
        shutil.copytree(tmp_path / "prepared", folder(stops + 1))
        os.kill(first, signal.SIGCONT)
    assert code == 0 and stops > 1 and files(folder(stops)) in allowed and files(folder(stops + 1)) == both[0]


def test_interrupted_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Ctrl-C stops a writer half-way: with neither the old files nor the new ones."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("old")
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        replace(source, target)
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replace_files(tmp_path) as part:
        for file in ("config.json", "model.safetensors"):
            (part / file).write_text("new")
        monkeypatch.setattr(os, "replace", interrupted)
    assert files(tmp_path) == {"config.json": b"new", "model.safetensors": b"new"} and not [*tmp_path.glob(".*")]
    plan = [(tmp_path / "gone", tmp_path / "x"), (tmp_path / "config.json", None)]
    carry_out(plan)
    assert not plan and not (tmp_path / "config.json").exists()


# ----- The lock ----------------------------------------------------------------------------------------------------


def test_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a lock keeps its own process out, lets another in, outlives its process or its folder, leaves anything
    behind, or removes what no run of ours has left; or if a file system without locks is passed over in silence, or
    stops the run."""
    folder = tmp_path / "new/folder"
    with locked(folder), locked(folder):
        assert finish(begin(lambda: locked(folder).__enter__())) == REFUSED
    assert not (tmp_path / "new").exists()
    with locked(folder):
        (folder / "file").touch()
    assert finish(begin(lambda: locked(folder).__enter__())) == 0  # and the child ended without unlocking
    with locked(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["file"]
    (folder / ".counterpart").mkdir()  # somebody's own
    (folder / ".eagle2-x.part").mkdir()
    (folder / ".eagle2-y.part").touch()  # of a file that another run writes at this moment, without a lock
    with locked(folder):
        pass
    assert {path.name for path in folder.iterdir()} == {"file", ".counterpart", ".eagle2-y.part"}

    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with replace_files(folder) as part:
        (part / "file").write_text("new")
    assert (folder / "file").read_text() == "new"
    error = capsys.readouterr().err
    assert "has no locks (Operation not supported)" in error and error.count("\n") == 1


def test_errors_name_no_scratch_folder(tmp_path: Path) -> None:
    """Fails if an error names a file in a scratch folder, which is gone when the user reads it."""
    with pytest.raises(OSError) as error, replace_files(tmp_path / "out") as part:
        (part / "sub/config.json").write_text("")
    assert str(tmp_path / "out/sub/config.json") in str(error.value) and ".part" not in str(error.value)
    with pytest.raises(OSError) as error, replace_when_whole(tmp_path / "none/x.json") as part:
        part.write_text("")
    assert str(tmp_path / "none/x.json") in str(error.value) and ".part" not in str(error.value)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), replace_files(tmp_path / "file"):
        pass
    assert files(tmp_path) == {"file": b""} and not (tmp_path / "out").exists()


def test_quantized_files_never_outlive_their_model(tmp_path: Path) -> None:
    """Fails if a new head or model leaves the quantised file of the old one beside it, which would be loaded."""
    (tmp_path / "model-int8.safetensors").touch()
    (tmp_path / "draft_vocab.json").touch()
    with replace_files(tmp_path) as part:
        save_file({"x": torch.zeros(1)}, part / "model.safetensors")
    assert files(tmp_path).keys() == {"model.safetensors", "draft_vocab.json"}
    (tmp_path / "model-int8.safetensors").touch()
    with replace_files(tmp_path) as part:
        (part / "acceptance.json").touch()
    assert (tmp_path / "model-int8.safetensors").exists()


def test_links_and_devices_stay(tmp_path: Path) -> None:
    """Fails if a result that is written to a link or to /dev/null puts a file in its place, or if a file that nobody
    else may read becomes readable."""
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for text in ("one", "two"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "file").read_text() == text and (tmp_path / "link").is_symlink()
        assert text == "one" or (tmp_path / "file").stat().st_mode & 0o777 == 0o600
        (tmp_path / "file").chmod(0o600)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "three")
    assert os.read(reader, 99) == b"three" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_profiles_of_two_runs_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run that measures for seconds forgets what another one wrote meanwhile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = [1.0] * (3 + len(tree_size.NODES))

    def measure(*_: object) -> list[float]:
        monkeypatch.setattr(tree_size, "measure", lambda *_: profile)
        tree_size.cached_profile("other", None, None, 0)
        return profile

    monkeypatch.setattr(tree_size, "measure", measure)
    assert tree_size.cached_profile("one", None, None, 0) == profile
    assert json.loads((tmp_path / "eagle2/trees.json").read_text()).keys() == {"one", "other"}


def test_a_state_of_another_training(tmp_path: Path) -> None:
    """Fails if a damaged state, or that of a training with other options, ends in a traceback or trains on."""
    def trainer(width: int, optimizers: int = 0) -> SimpleNamespace:
        module = Trained(width)
        return SimpleNamespace(step=3, seconds=1.0, module=module, folders=(), export=lambda: None, device="cpu",
                               optimizers=[torch.optim.SGD(module.parameters(), 0.1) for _ in range(optimizers)])

    Trainer.save(trainer(2), tmp_path)
    Trainer.resume(trainer(2), tmp_path)
    Trainer.resume(trainer(5), tmp_path / "nothing")
    for other in (trainer(3), trainer(2, 1)):
        with pytest.raises(ValueError, match=r"state\.pt: damaged, or of a training with other options"):
            Trainer.resume(other, tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"state\.pt: damaged"):
        Trainer.resume(trainer(2), tmp_path)
