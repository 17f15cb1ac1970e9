"""Damage to files, drawn from a random.Random: the same seed gives the same files. And what loaders may do with it."""
import json
import os
import random
import re
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SPARE_BYTES = 1 << 30  # additional address space that loading a few kilobytes may take


# ----- What is allowed ---------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, so that no `except Exception` catches it."""


@contextmanager
def bounded(seconds: int = 20) -> Iterator[None]:
    """Fail if the block computes for longer, waits for ten times as long, or takes SPARE_BYTES more memory than before.
    """
    def stop(*_: object) -> None:
        raise Hang(f"still busy after {seconds} s of computing, or {10 * seconds} s in all")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 10 * seconds))
    before = [signal.signal(number, stop) for _, number, _ in timers]
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, hard))
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before.pop(0))
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refusal(load: Callable[..., object], *inputs: object) -> str:
    """The line that a command prints if load(*inputs) refuses them; "" if it works. All else fails: other exceptions,
    an error without a text, a hang, or much more memory than such small files need."""
    with bounded():
        try:
            load(*inputs)
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            assert line, repr(error)
            return line
    return ""


# ----- Bytes -------------------------------------------------------------------------------------------------------


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One to eight bytes changed, anywhere or in the first 2,000. Of ten files, one is cut off too."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        position = draw.randrange(draw.choice((len(data), min(len(data), 2000))))
        changed[position] = draw.choice((draw.randrange(256), draw.choice(b'0123456789"{}[],:-eE.')))
    if draw.random() < 0.1:
        changed = changed[:draw.randrange(len(data))]
    return bytes(changed)


JINJA = ["if", "endif", "for", "endfor", "set", "macro m()", "endmacro", "generation", "break", "do", "not", "in", "is",
         "loop.index", "messages", "m", "none", "{{", "}}", "{%-", "-%}", "{#", "[-1]", "['x']", ".x", "()", "(1)", "|",
         "|tojson", "|list", "~", "*", "**", "//", "%", "0", "9999", "'", "raise_exception('no')", "range(9)"]


def damaged_template(data: bytes, draw: random.Random) -> bytes:
    """A chat template with one or two of its words replaced, left out or moved; or with damage to its bytes."""
    if draw.random() < 0.1:
        return flipped(data, draw)
    words = re.findall(r"\w+|\s+|[{%}-]{2,3}|.", data.decode(), re.DOTALL)
    for _ in range(draw.choice((1, 1, 2))):
        words[draw.randrange(len(words))] = draw.choice([draw.choice(words), draw.choice(JINJA), ""])
    return "".join(words).encode()


# ----- JSON --------------------------------------------------------------------------------------------------------

VALUES = [None, -1, 0, 1, 10**9, 2**31 - 1, 2**40, 2**70, 1e300, -0.5, float("nan"), float("inf"), "", "x", [], {},
          True, [1, 2], {"a": 1}, [None], [[]], ["x"], [2**70], [-1]]
# Text in place of a value: numbers of thousands of digits, half a character, what nests too deep, what is no JSON.
TEXTS = ["1" * 400, "9" * 4000, "9" * 5000, "-1e999", "1e-999", "-0", r'"\ud800"', r'"\u0000"', r'"\n\n"', "nul", "",
         "'x'", "[1,]", "[" * 900 + "]" * 900, "[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5,
         '{"a": 1, "a": 2}', '"/etc/passwd"', '"../../x"', '"' + "a/" * 3000 + '"', '"' + "x" * 10**5 + '"']


def key_paths(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The path of keys and indices to every value inside a JSON value; of long lists and objects the first 25."""
    yield path
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        entries = []
    for key, inner in entries[:25]:
        yield from key_paths(inner, (*path, key))


def replaced(value: object, path: tuple, new: object) -> object:
    """A copy of a JSON value with the value at this path replaced."""
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = replaced(copied[path[0]] if len(path) > 1 else None, path[1:], new)
    return copied


def value_at(value: object, path: tuple) -> object:
    for key in path:
        value = value[key]
    return value


def damaged_json(data: bytes, draw: random.Random, more_keys: tuple[str, ...] = ()) -> bytes:
    """A JSON file with one value replaced, left out, moved or written oddly, or with damage to its text. `more_keys`:
    keys that it lacks, to be set too."""
    value = json.loads(data)
    paths = [*key_paths(value), *((key,) for key in more_keys)]
    path = draw.choice(paths)
    how = draw.randrange(8)
    if how < 2:
        return json.dumps(replaced(value, path, draw.choice(VALUES))).encode()
    if how == 2:
        return json.dumps(replaced(value, path, "@@")).replace('"@@"', draw.choice(TEXTS)).encode()
    if how == 3:
        return json.dumps(replaced(value, path, value_at(value, draw.choice([*key_paths(value)])))).encode()
    if how == 4 and path and path[0] not in more_keys:  # one entry less
        parent = value_at(value, path[:-1])
        rest = ({key: inner for key, inner in parent.items() if key != path[-1]} if isinstance(parent, dict)
                else parent[:path[-1]] + parent[path[-1] + 1:])
        return json.dumps(replaced(value, path[:-1], rest)).encode()
    if how == 5:
        return draw.choice([b"", b"null", b"[]", b"0", b"{}", b'""', b"\xef\xbb\xbf" + data, data + b"}", data * 2,
                            data.decode().encode("utf-16"), data.replace(b'"', b"'"), b"\0" * len(data),
                            b"<!DOCTYPE html><html>Sign in</html>", b"version https://git-lfs.github.com/spec/v1\n"])
    return flipped(data, draw) if how == 6 else data[:draw.randrange(len(data))]


def damaged_lines(data: bytes, draw: random.Random) -> bytes:
    """A file of JSON lines with damage to one line, or with a line twice, missing or joined with the next."""
    lines = data.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    new = draw.choice([b"", lines[at] * 2, lines[at].strip(), b"\0" * 99, b"\r" + lines[at], flipped(lines[at], draw),
                       *(damaged_json(lines[at].strip(), draw) + b"\n" for _ in range(12))])
    return b"".join([*lines[:at], new, *lines[at + 1:]])


# ----- safetensors -------------------------------------------------------------------------------------------------

SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
         "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}
NUMBERS = [0, 1, -1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, 0.5]


def safetensors_file(header: object, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def split_safetensors(raw: bytes) -> tuple[dict, bytes]:
    """The header of a safetensors file, and the data."""
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def damaged_safetensors(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file with damage to its bytes, its header or its metadata, or a whole file of another model."""
    header, data = split_safetensors(raw)
    how = draw.randrange(7)
    if how == 0:
        return flipped(raw, draw)
    if how == 1:  # cut off where something begins or ends
        ends = [end for entry in header.values() for end in entry.get("data_offsets", ())]
        whole_header = len(raw) - len(data)
        return raw[:draw.choice([0, 1, 7, 8, 9, whole_header - 1, whole_header, *(whole_header + end for end in ends)])]
    if how == 2:
        return safetensors_file(damaged_json(json.dumps(header).encode(), draw), data)
    if how == 3:
        metadata = header.get("__metadata__", {}) | {
            draw.choice(["mode", "group", "format", "embedding", "dtype", "x"]): draw.choice(
                ["int8", "int8dyn", "int4", "fp8", "", "0", "64", "128", "-1", "1e9", "x" * 10**5, "target", "\ud800"])}
        return safetensors_file(header | {"__metadata__": metadata}, data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    if how == 4:
        numbers = [*NUMBERS, len(data), len(data) + 1]
        key = draw.choice(["shape", "data_offsets"])
        new = draw.choice([[draw.choice(numbers) for _ in range(draw.randrange(4))], [*header[name][key], 1],
                           header[name][key][::-1], header[draw.choice([*header][1:])].get(key)])
        return safetensors_file(header | {name: header[name] | {key: new}}, data)
    return other_tensor(header, data, name, draw)


def other_tensor(header: dict, data: bytes, name: str, draw: random.Random) -> bytes:
    """A whole file in which one tensor has another dtype, shape or name, is missing, or is there twice."""
    tensors = {key: entry for key, entry in header.items() if key != "__metadata__"}
    parts = {key: data[slice(*entry["data_offsets"])] for key, entry in tensors.items()}
    how = draw.randrange(5)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[draw.choice(["x", name + ".x", name.replace("weight", "bias"), "0" + name])] = tensors[name]
    else:
        dtype = draw.choice([*SIZES]) if how < 4 else tensors[name]["dtype"]
        shape = tensors[name]["shape"]
        if how > 2:
            shape = draw.choice([[], [0], [1, *shape], shape[::-1], shape[:-1], [2 * n for n in shape], [*shape, 0]])
        tensors[name] = {"dtype": dtype, "shape": shape}
        count = SIZES[dtype]
        for n in shape:
            count *= n
        parts[name] = draw.randbytes(count) if draw.random() < 0.5 else bytes(count)
    end = 0
    made = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    written = []
    for key, entry in tensors.items():
        part = parts[key] if key in parts else parts[name]
        made[key] = entry | {"data_offsets": [end, end + len(part)]}
        written.append(part)
        end += len(part)
    return safetensors_file(made, b"".join(written))


# ----- GGUF --------------------------------------------------------------------------------------------------------

ITEM_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by the number of a type
STRING, ARRAY = 8, 9


def gguf_fields(raw: bytes) -> list[tuple[int, int]]:
    """Where each field of a GGUF header starts, and its size: counts, lengths, types, values, names, sizes, offsets.
    https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""
    fields = []
    position = 0

    def take(size: int) -> int:
        nonlocal position
        fields.append((position, size))
        position += size
        return int.from_bytes(raw[position - size:position], "little")

    def take_value(kind: int) -> None:
        if kind == STRING:
            take(take(8))
        elif kind == ARRAY:
            item = take(4)
            length = take(8)
            if item == STRING:
                for _ in range(length):
                    take_value(STRING)
            else:
                take(length * ITEM_SIZES[item])
        else:
            take(ITEM_SIZES[kind])

    take(4), take(4)  # magic, version
    num_tensors, num_values = take(8), take(8)
    for _ in range(num_values):
        take(take(8))
        take_value(take(4))
    for _ in range(num_tensors):
        take(take(8))
        for _ in range(take(4)):
            take(8)
        take(4), take(8)  # type, offset
    return fields


def damaged_gguf(raw: bytes, draw: random.Random, fields: list[tuple[int, int]]) -> bytes:
    """A GGUF file with damage to one field of its header (`fields`: gguf_fields), cut off where one begins, or with
    other bytes somewhere. Half of the fields are drawn from those that are no piece of the vocabulary."""
    start, size = draw.choice(fields if draw.random() < 0.5 else fields[:60] + fields[-300:])
    how = draw.randrange(6)
    if how == 0:
        return flipped(raw, draw)
    if how == 1:
        return raw[:draw.choice([start, start + size // 2, start + size, draw.randrange(len(raw))])]
    if how == 2:  # a field left out: all that follows moves
        return raw[:start] + raw[start + size:]
    if how == 3 and size in (4, 8):
        number = int.from_bytes(raw[start:start + size], "little") + draw.choice([-1, 1, 2, 256])
        new = (number % 256**size).to_bytes(size, "little")
    elif size in (4, 8):
        new = (draw.choice([0, 1, 2, 8, 9, 13, 39, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**64 - 1])
               % 256**size).to_bytes(size, "little")
    else:
        new = draw.choice([draw.randbytes(size), bytes(size), b"\xff" * size, raw[start:start + size][::-1]])
    return raw[:start] + new + raw[start + size:]


# ----- Trying it ---------------------------------------------------------------------------------------------------

SEED = int(os.environ.get("FUZZ_SEED", "0"))
TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def fuzz(path: Path, cases: int, damage: Callable[[bytes, random.Random], bytes], load: Callable[..., object],
         *inputs: object) -> None:
    """Damage this file so often, each time anew, and load(*inputs). Some of the files, and only damaged ones, must be
    refused: else the file is not what `load` reads. FUZZ_SEED=7 FUZZ_TIMES=20 give other damage, and more of it."""
    data = path.read_bytes()
    assert refusal(load, *inputs) == "", path
    draw = random.Random(f"{SEED} {path.name}")
    refused = 0
    for case in range(cases * TIMES):
        path.write_bytes(damage(data, draw))
        try:
            refused += refusal(load, *inputs) != ""
        except BaseException as error:
            error.add_note(f"case {case} of {path.parent.name}/{path.name}, seed {SEED}")
            raise
    path.write_bytes(data)
    assert refused, path
