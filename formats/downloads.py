"""Files that are not what their names say: from clones, broken downloads, and networks that ask for a login."""
import json
from pathlib import Path


def not_what_it_is_called(path: Path) -> str | None:
    """What a file really is and what to do, in one line: where it is a Git-LFS pointer, a web page, a server's error in
    JSON, empty or cut off. None for any other file, sound or not. Raises OSError if the file does not exist."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(1024)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return (f"{path}: a Git-LFS pointer, a few lines that stand for the file: run `git lfs pull` in its folder, or "
                "download it with `hf download`")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<error")):
        return (f"{path}: a web page, which a proxy or a login page sent in place of the file: delete it and download "
                "it again")
    if path.suffix.lower() != ".jinja" and not text:
        return f"{path}: empty: download it again" if size == 0 else None
    if path.suffix == ".json" and size <= len(start) and (said := server_error(start)):
        return f"{path}: not the file, but a server's answer ({said}): delete it and download it again"
    if path.suffix == ".safetensors":
        return cut_safetensors(path, size, start)
    if path.suffix in (".bin", ".pt") and start[:4] == b"PK\x03\x04" and not ends_as_zip(path):
        return f"{path}: damaged, cut off: finish the download"
    return None


def cut_safetensors(path: Path, size: int, start: bytes) -> str | None:
    """The line for a safetensors file that is shorter than its header says: the length of the header in 8 bytes, the
    header in JSON, the data (https://github.com/huggingface/safetensors#format)."""
    if size <= len(start) and (said := server_error(start)):
        return f"{path}: not weights, but a server's answer ({said}): delete it and download it again"
    header = int.from_bytes(start[:8], "little")
    if header > 10**8:  # the format's own limit
        return f"{path}: damaged, or not a safetensors file: delete it and download it again"
    if size < 8 + header:
        return f"{path}: damaged, cut off in its header after {size} bytes: download or make it again"
    with open(path, "rb") as file:
        file.seek(8)
        try:
            entries = json.loads(file.read(header))
            entries.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None
    if isinstance(end, int) and size < 8 + header + end:
        return f"{path}: damaged, cut off after {size} of {8 + header + end} bytes: download or make it again"
    return None


def server_error(content: bytes) -> str | None:
    """What an answer in JSON says, such as {"error": "blocked"}. None for any other content."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or "model_type" in answer:
        return None
    return next((first_words(answer[key]) for key in ("error", "message", "detail", "errors") if key in answer), None)


def first_words(said: object) -> str:
    return " ".join(str(said)[:100].split()) or "without a word"


def ends_as_zip(path: Path) -> bool:
    """Whether the directory of a zip file, which comes last, is there."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65_557))  # its own 22 bytes, and a comment of at most 65,535
        return b"PK\x05\x06" in file.read()
