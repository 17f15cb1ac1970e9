"""Damaged files: whatever is wrong with a checkpoint, a head or a tokenizer, it ends in one line or it works.

Each case damages one file of a whole tiny folder, loads it as generate.py does and writes four tokens. Allowed are
ValueError and OSError, and a text. Anything else fails here: other exceptions, a hang, memory that the files do not
account for, code that ran. The random cases are the same ones every time.
"""
import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny

import generate
from app import answer, options
from drafters import tree_size
from formats.eagle import CURVE
from sampling import Sampling

SPARE_BYTES = 1 << 30  # address space that a load of a few kilobytes may take on top
METHODS = {"": ["--eagle2"], "eagle": ["--eagle2"], "eagle_pickle": ["--eagle2", "--draft", "eagle_pickle"],
           "medusa": ["--medusa", "medusa"], "medusa_pickle": ["--medusa", "medusa_pickle"],
           "draft": ["--speculate", "draft"], "int8": ["--checkpoint", "int8"]}  # by folder: what loads its files


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


class Hang(BaseException):
    """Not an Exception: nobody swallows it."""


@contextmanager
def bounded(seconds: int = 20) -> Iterator[None]:
    """Whoever takes longer, or more memory than a small file can ask for, fails."""
    def stop(*_: object) -> None:
        raise Hang(f"still busy after {seconds} s")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, hard))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def attempt(folder: Path, *words: str) -> str:
    """What is wrong, in the words that generate.py would print; "" where nothing is."""
    words = [str(folder / word) if (folder / word).is_dir() else word for word in words]
    args = generate.parse_args(["--checkpoint", str(folder), "--device", "cpu", "--max_seq_len", "64",
                                "--prompt", "Hi", *words])
    with bounded():
        try:
            engine = options.load_engine(args)
            tokenizer = engine.tokenizer
            ids = generate.read_prompt(args, tokenizer)
            engine.check(ids)
        except (ValueError, OSError) as error:
            assert str(error), repr(error)
            return str(error)
        result = answer.generate(engine, ids, 4, Sampling(), tokenizer, args.method)
        assert 1 <= result["new_tokens"] <= 4
    return ""


def files_of(whole: Path, pattern: str = "*") -> list[Path]:
    return sorted(path.relative_to(whole) for path in whole.rglob(pattern) if path.is_file())


def words_for(file: Path) -> list[str]:
    return METHODS[str(file.parent).replace(".", "")]


def test_whole_folder_works(copy: Path) -> None:
    """The other tests would pass if nothing ever loaded."""
    for words in METHODS.values():
        assert attempt(copy, *words) == ""


@pytest.mark.parametrize("part", range(5))
def test_flipped_bytes(part: int, copy: Path) -> None:
    """Guards every loader against what a bad disk, a proxy or an editor makes of a file: bytes changed anywhere, or in
    its first 2,000, or its end cut off. A damaged pickle raises KeyError, IndexError and worse; a NaN must not hang."""
    draw, files, loads = random.Random(part), files_of(copy), 0
    for _ in range(100):
        file = draw.choice(files)
        data = (copy / file).read_bytes()
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(draw.choice((len(data), min(len(data), 2000))))
            changed[place] = draw.choice((draw.randrange(256), draw.choice(b'0123456789"{}[],:-eE.')))
        if draw.random() < 0.1:
            changed = changed[:draw.randrange(len(data))]
        (copy / file).write_bytes(changed)
        loads += attempt(copy, *words_for(file)) == ""
        (copy / file).write_bytes(data)
    assert 10 < loads < 90  # some flips are in weights, some in headers


def safetensors_file(header: object, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def with_entry(**changes: object) -> Callable[[dict, bytes], bytes]:
    """A file whose entry of norm.weight is changed."""
    return lambda header, data: safetensors_file(
        header | {"norm.weight": header["norm.weight"] | changes}, data)


HEADERS = {
    "no length": lambda header, data: b"\x01\x02",
    "length 0": lambda header, data: safetensors_file(header, data, 0),
    "length past the end": lambda header, data: safetensors_file(header, data, 10**7),
    "length of exabytes": lambda header, data: safetensors_file(header, data, 2**63),
    "not JSON": lambda header, data: safetensors_file(b"{" * 80, data),
    "deep JSON": lambda header, data: safetensors_file(b'{"a":' * 50_000, data),
    "a list": lambda header, data: safetensors_file([header], data),
    "metadata is a list": lambda header, data: safetensors_file(header | {"__metadata__": ["pt"]}, data),
    "metadata of numbers": lambda header, data: safetensors_file(header | {"__metadata__": {"format": 1}}, data),
    "no metadata": lambda header, data: safetensors_file(
        {name: entry for name, entry in header.items() if name != "__metadata__"}, data),
    "group is no number": lambda header, data: safetensors_file(
        header | {"__metadata__": header["__metadata__"] | {"mode": "int4", "group": "x"}}, data),
    "name twice": lambda header, data: safetensors_file(
        json.dumps(header).encode()[:-1] + b', "norm.weight": ' + json.dumps(header["embed.weight"]).encode() + b"}",
        data),
    "data missing": lambda header, data: safetensors_file(header, data[:-4]),
    "more data": lambda header, data: safetensors_file(header, data + b"1234"),
    "offsets overlap": with_entry(data_offsets=[0, 128]),
    "offsets past the end": with_entry(data_offsets=[2**40, 2**40 + 128]),
    "offsets backwards": with_entry(data_offsets=[128, 0]),
    "offsets below 0": with_entry(data_offsets=[-128, 0]),
    "a dtype that there is not": with_entry(dtype="F31"),
    "a dtype of another size": with_entry(dtype="F64"),
    "integers": with_entry(dtype="I32"),
    "booleans": with_entry(dtype="BOOL", shape=[128]),
    "complex": with_entry(dtype="C64", shape=[16]),
    "another shape": with_entry(shape=[33]),
    "two dimensions": with_entry(shape=[2, 16]),
    "a shape of 2**64": with_entry(shape=[2**32, 2**32]),
    "a shape below 0": with_entry(shape=[-32]),
}


@pytest.mark.parametrize("how", HEADERS)
def test_headers(how: str, copy: Path) -> None:
    """Guards against believing a header: sizes that overflow, places that are another tensor's, no metadata."""
    file = copy / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    file.write_bytes(HEADERS[how](json.loads(raw[8:8 + size]), raw[8 + size:]))
    assert "model.safetensors" in attempt(copy)


VALUES = [None, -1, 0, 1, 10**9, 2**31 - 1, 2**40, 2**70, 1e300, -0.5, float("nan"), float("inf"), "", "x", [], {},
          True, [1, 2], {"a": 1}, [None], [[]], ["x"], [2**70], [-1]]
MORE = {"config.json": ["rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config"],
        "tokenizer_config.json": ["added_tokens_decoder", "additional_special_tokens", "tokenizer_class", "unk_token"],
        "tokenizer.json": ["truncation", "padding", "normalizer", "post_processor"]}  # keys that the files here lack


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Every way down into a JSON value, of long lists the first few entries."""
    yield at
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries)[:25]:
        yield from places(inner, (*at, key))


def changed(value: object, at: tuple, new: object) -> object:
    if not at:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = changed(copied[at[0]] if len(at) > 1 else None, at[1:], new)
    return copied


def test_json_of_another_kind(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards every number, list and name that is read from JSON against being another thing. Sizes of 10**9 must be
    refused before anything is allocated, and 10**9 layers before they are made one by one."""
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: [1.0] * 9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "cache"))
    draw = random.Random(0)
    for file in files_of(copy, "*.json"):
        data = (copy / file).read_text()
        value, words = json.loads(data), words_for(file)
        words = words + ["--draft_tokens", "auto"] * (file.name == CURVE)
        cases = [(at, new) for at in [*places(value), *((key,) for key in MORE.get(file.name, ()))] for new in VALUES]
        for at, new in draw.sample(cases, min(len(cases), 20 if file.parent.name else 50)):
            (copy / file).write_text(json.dumps(changed(value, at, new)))
            attempt(copy, *words)
        (copy / file).write_text(data)


@pytest.mark.parametrize("changes", [
    {"hidden_size": 10**9}, {"hidden_size": 2**31 - 8}, {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 8},
    {"num_hidden_layers": 10**9}, {"head_dim": 2**31 - 2, "num_attention_heads": 2**30, "num_key_value_heads": 2},
    {"vocab_size": 2**40}, {"max_position_embeddings": 2**40}, {"eos_token_id": {}}, {"eos_token_id": 2**70}])
def test_sizes_out_of_this_world(changes: dict, copy: Path) -> None:
    """Guards against layers made one by one for minutes, and products that overflow in PyTorch, both before the file
    of weights is looked at; and ids that fit no tensor."""
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | changes))
    assert str(copy) in attempt(copy)


def test_on_the_command_line(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Guards what the user sees: exit code 2 and one line."""
    for file, data in (("model.safetensors", b"\xff" * 99), ("config.json", b'{"hidden_size": 1e9}'),
                       ("generation_config.json", b'{"eos_token_id": {}}'), ("tokenizer.json", b"{}"),
                       ("tokenizer_config.json", b"\x00"), ("eagle/config.json", b"[]"),
                       ("eagle/draft_vocab.json", b"[1, 2"), ("eagle/model.safetensors", b"")):
        whole = (copy / file).read_bytes()
        (copy / file).write_bytes(data)
        monkeypatch.setattr("sys.argv", ["generate.py", "--checkpoint", str(copy), "--device", "cpu", "--eagle2",
                                         "--prompt", "x"])
        with pytest.raises(SystemExit) as exit:
            generate.main()
        out, err = capsys.readouterr()
        assert exit.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, file
        assert Path(file).name in err, err
        (copy / file).write_bytes(whole)
