"""Which heads training has exported itself: those it may replace, and no others.

Beside the state of a training lies the file `exported`: the sha256 of the files of weights that it wrote last.
"""
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formats.writing import replace_files

EXPORTED = "exported"


def digests(folder: Path) -> set[str]:
    """The sha256 of each file of weights in this folder."""
    found = set()
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        with path.open("rb") as file:
            found.add(hashlib.file_digest(file, "sha256").hexdigest())
    return found


@contextmanager
def exporting(work: Path, *folders: Path) -> Iterator[None]:
    """A context in which heads are exported to these folders. At its end the file in `work` gets their sha256. A run
    that is killed before that leaves a state without the file, which may replace any head: see `foreign`."""
    (work / EXPORTED).unlink(missing_ok=True)
    yield
    with replace_files(work) as part:
        (part / EXPORTED).write_text("".join(f"{digest}\n" for folder in folders for digest in sorted(digests(folder))))


def foreign(work: Path, *folders: Path) -> Path | None:
    """The first of these folders that holds a head which the training with its state in `work` has not exported. To a
    state without the file, which older versions wrote, every head is its own."""
    known = set()
    if (work / "state.pt").exists():
        if not (work / EXPORTED).exists():
            return None
        known = {*(work / EXPORTED).read_text().split()}
    return next((folder for folder in folders if (folder / "config.json").exists() and not known & digests(folder)),
                None)
