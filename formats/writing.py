"""Writing files so that there is the old or the new, never half of either, whoever is killed or writes there too.

    replace_when_whole(path)   one file that stands alone. Of two writers, the last one wins; write_text is the same
    replace_files(folder)      files that belong together. Of two writers, the second is refused
    locked(folder)             refuses others for longer, while a run reads what it will replace

Files are written under names of their own, which two runs never share, and renamed when they are whole.
"""
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt")  # nothing loads without such a file
QUANTIZED = "model-int*.safetensors"  # made from the model.safetensors beside it
# How names of scratch files and folders begin and end. `open_locked` removes the folders (not files) of killed runs.
SCRATCH, PART = ".eagle2-", ".part"
held: set[tuple[int, int]] = set()  # the folders that this process has locked: device and inode


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let no other run write to `folder`. It is made if need be; a folder made here is removed at the end if empty.

    Raises OSError at once if another run has it locked. The lock is the kernel's (flock on the folder): it ends with
    the process, however that ends. If the file system has no locks, a line on stderr says so and nothing is locked.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = open_locked(folder)
    status = os.fstat(descriptor)
    inode = status.st_dev, status.st_ino
    is_outermost = inode not in held
    held.add(inode)
    try:
        yield
    finally:
        if is_outermost:
            held.remove(inode)
        with suppress(OSError):  # after a success `folder` is not empty, so that the first rmdir fails
            for path in new_folders:
                path.rmdir()
        os.close(descriptor)


def open_locked(folder: Path) -> int:
    """A descriptor of the folder with a lock on it, or without where this process has one already."""
    for _ in range(10):  # another run may remove an empty folder between two of these lines
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            status = os.fstat(descriptor)
        except FileNotFoundError as error:
            reason = error
            continue
        if (status.st_dev, status.st_ino) in held:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OSError(f"another run is writing to {folder}: wait for it to end, or choose another folder") from None
        except OSError as error:  # some network file systems
            print(f"{folder}: its file system has no locks ({error.strerror}): let no other run write there meanwhile",
                  file=sys.stderr)
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(status, os.stat(folder)):
                for left in folder.glob(f"{SCRATCH}*{PART}"):  # by runs that were killed: nobody else writes here now
                    if left.is_dir():  # the files are replace_when_whole's, which takes no lock: they may be in use
                        shutil.rmtree(left, ignore_errors=True)
                return descriptor
        os.close(descriptor)
        reason = FileNotFoundError(f"{folder}: removed by another run; try again")
    raise reason


@contextmanager
def replace_files(folder: Path, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a scratch folder in `folder`. When the block ends without an error, its files replace those of the same
    names. Files that match `stale` (names, patterns) are removed; with a new model.safetensors those of QUANTIZED too.

    After an error in the block `folder` is as it was. A run that is killed leaves the old files, or the new ones, or
    for the time of a few renames a folder without weights, which does not load (see `steps`).
    """
    with locked(folder):
        part = None
        try:
            part = Path(tempfile.mkdtemp(PART, SCRATCH, folder))
            yield part
            plan = steps(part, folder, stale)
            try:
                carry_out(plan)
            except KeyboardInterrupt:
                carry_out(plan)  # half-way is no place to stop
                raise
        except OSError as error:
            path = Path(str(error.filename))
            if not path.is_relative_to(part or folder):
                raise
            # The scratch folder is about to be gone, or could not be made: say where the file should have been.
            raise OSError(error.errno, error.strerror, str(folder / path.relative_to(part) if part else folder)
                          ) from error
        finally:
            if part:
                shutil.rmtree(part, ignore_errors=True)


def steps(part: Path, folder: Path, stale: tuple[str, ...]) -> list[tuple[Path, Path | None]]:
    """What makes the files in `part` those of `folder`, step by step: (file, where to), or (file, None) to remove it.

    Several files cannot be renamed as one. So that an old config.json never meets new weights, nor an old tokenizer,
    the old weights go first and the new ones come last; between them nothing loads. (With config.json as the first and
    last, Medusa heads, which load without one, would not be safe.) Files that stay the same need no step, unless they
    hold weights. Where a single one is left, as when training writes a head again, its rename alone is the step, and
    the old file is there until then.
    """
    written = sorted(part.iterdir())
    names = {file.name for file in written}
    new = [file for file in written if file.suffix in WEIGHTS or not is_same(file, folder / file.name)]
    old = {file for pattern in (*stale, QUANTIZED * ("model.safetensors" in names)) if pattern
           for file in folder.glob(pattern) if file.name not in names}
    if len(new) + len([file for file in old if file.suffix not in WEIGHTS]) > 1:
        old |= {folder / file.name for file in new if file.suffix in WEIGHTS}
    removals = sorted(old, key=lambda file: file.suffix not in WEIGHTS)
    moves = sorted(new, key=lambda file: file.suffix in WEIGHTS)
    return [(file, None) for file in removals] + [(file, folder / file.name) for file in moves]


def is_same(file: Path, other: Path) -> bool:
    return other.is_file() and file.read_bytes() == other.read_bytes()


def carry_out(plan: list[tuple[Path, Path | None]]) -> None:
    """Do all steps, and take from the list those that are done, so that a second call goes on after an interruption."""
    while plan:
        file, target = plan[0]
        if target is None:
            file.unlink(missing_ok=True)
        elif file.exists():
            os.replace(file, target)
        del plan[0]


@contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`, and rename it to `path` when the block ends without an error. After an error
    `path` is as it was. The folder must exist."""
    part = path.with_name(f"{SCRATCH}{secrets.token_hex(8)}{PART}")
    try:
        yield part
        if path.is_file():
            shutil.copymode(path, part)  # what nobody else may read stays so
        os.replace(part, path)
    except OSError as error:
        if str(error.filename) != str(part):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as a whole. A link stays a link; what is no file, such as /dev/stdout, is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    with replace_when_whole(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())
