"""Damaged files: a damaged checkpoint, head or tokenizer either ends in a one-line error or works.

Each case damages one file of a complete tiny folder, loads the folder as generate.py does and writes four tokens. A
ValueError, an OSError or a text is allowed. All else is a failure: other exceptions, a hang, or much more memory than
such small files need. The random cases are the same in every run. test_fuzz_loaders.py, test_fuzz_conversion.py and
test_fuzz_texts.py damage more kinds of files and load only these.

    python -m pytest tests/formats/test_corrupt.py
"""
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from damage import VALUES, bounded, flipped, key_paths, replaced, safetensors_file, split_safetensors

import generate
from app import answer, options
from drafters import tree_size
from formats.eagle import CURVE
from sampling import Sampling

# The options that load the files of each folder that tiny.save_everything makes.
METHODS = {"": ["--eagle2"], "eagle": ["--eagle2"], "eagle3": ["--eagle3"], "block": ["--block"],
           "eagle_pickle": ["--eagle2", "--draft", "eagle_pickle"], "medusa": ["--medusa", "medusa"],
           "medusa_pickle": ["--medusa", "medusa_pickle"],
           "draft": ["--speculate", "draft"], "int8": ["--checkpoint", "int8"]}


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def attempt(folder: Path, *method: str) -> str:
    """Load the folder with these options and write four tokens. Returns the error that generate.py would print; "" if
    there is none."""
    method = [str(folder / word) if (folder / word).is_dir() else word for word in method]
    args = generate.parse_args(["--checkpoint", str(folder), "--device", "cpu", "--max_seq_len", "64",
                                "--prompt", "Hi", *method])
    with bounded():
        try:
            engine = options.load_engine(args)
            tokenizer = engine.tokenizer
            ids = generate.read_prompt(args, tokenizer)
            engine.check(ids, 4)
        except (ValueError, OSError) as error:
            assert str(error), repr(error)
            return str(error)
        result = answer.generate(engine, ids, 4, Sampling(), tokenizer, args.method)
        assert 1 <= result["new_tokens"] <= 4
    return ""


def files_of(folder: Path, pattern: str = "*") -> list[Path]:
    """Paths of all files, relative to the folder."""
    return sorted(path.relative_to(folder) for path in folder.rglob(pattern) if path.is_file())


def options_for(file: Path) -> list[str]:
    """The options with which generate.py loads this file."""
    return METHODS[str(file.parent).replace(".", "")]


@pytest.mark.slow
def test_whole_folder_works(copy: Path) -> None:
    """Fails if the undamaged folder does not load: then the other tests would prove nothing."""
    for method in METHODS.values():
        assert attempt(copy, *method) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_flipped_bytes(part: int, copy: Path) -> None:
    """Fails if a loader cannot cope with changed bytes, anywhere or in the first 2,000, or with a file that is cut off.
    A damaged pickle can raise any exception, and a NaN in the weights must not hang."""
    draw = random.Random(part)
    files = files_of(copy)
    loads = 0
    for _ in range(100):
        file = draw.choice(files)
        data = (copy / file).read_bytes()
        (copy / file).write_bytes(flipped(data, draw))
        loads += attempt(copy, *options_for(file)) == ""
        (copy / file).write_bytes(data)
    assert 10 < loads < 90  # some flips are in weights, some in headers


def with_entry(**changes: object) -> Callable[[dict, bytes], bytes]:
    """Makes a file in which the header's entry of norm.weight is changed."""
    return lambda header, data: safetensors_file(
        header | {"norm.weight": header["norm.weight"] | changes}, data)


# Makes a damaged file from the header and the data of a whole one.
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
    "an unknown dtype": with_entry(dtype="F31"),
    "a dtype of another size": with_entry(dtype="F64"),
    "integers": with_entry(dtype="I32"),
    "booleans": with_entry(dtype="BOOL", shape=[128]),
    "complex": with_entry(dtype="C64", shape=[16]),
    "another shape": with_entry(shape=[33]),
    "two dimensions": with_entry(shape=[2, 16]),
    "a shape of 2**64": with_entry(shape=[2**32, 2**32]),
    "a shape below 0": with_entry(shape=[-32]),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", HEADERS)
def test_headers(how: str, copy: Path) -> None:
    """Fails if a header is trusted: sizes that overflow, offsets into another tensor's data, missing metadata."""
    file = copy / "model.safetensors"
    file.write_bytes(HEADERS[how](*split_safetensors(file.read_bytes())))
    assert "model.safetensors" in attempt(copy)


# Keys that the files of the tiny folder lack, to be set too.
MORE = {"config.json": ["rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config"],
        "tokenizer_config.json": ["added_tokens_decoder", "additional_special_tokens", "tokenizer_class", "unk_token"],
        "tokenizer.json": ["truncation", "padding", "normalizer", "post_processor"]}


@pytest.mark.slow
def test_json_of_another_kind(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a value of the wrong kind or size in a JSON file is not refused cleanly. A size of 10**9 must be refused
    before anything is allocated, and 10**9 layers before they are built one by one."""
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: [1.0] * 9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy / "cache"))
    draw = random.Random(0)
    for file in files_of(copy, "*.json"):
        data = (copy / file).read_text()
        value = json.loads(data)
        method = options_for(file) + ["--draft_tokens", "auto"] * (file.name == CURVE)
        paths = [*key_paths(value), *((key,) for key in MORE.get(file.name, ()))]
        cases = [(path, new) for path in paths for new in VALUES]
        for path, new in draw.sample(cases, min(len(cases), 20 if file.parent.name else 50)):
            (copy / file).write_text(json.dumps(replaced(value, path, new)))
            attempt(copy, *method)
        (copy / file).write_text(data)


@pytest.mark.parametrize("changes", [
    {"hidden_size": 10**9}, {"hidden_size": 2**31 - 8}, {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 8},
    {"num_hidden_layers": 10**9}, {"head_dim": 2**31 - 2, "num_attention_heads": 2**30, "num_key_value_heads": 2},
    {"vocab_size": 2**40}, {"max_position_embeddings": 2**40}, {"eos_token_id": {}}, {"eos_token_id": 2**70}])
def test_impossible_sizes(changes: dict, copy: Path) -> None:
    """Fails if impossible sizes are not refused before the weight file is opened: layers would be built one by one for
    minutes, and products would overflow in PyTorch. Fails too for ids that fit into no tensor."""
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | changes))
    assert str(copy) in attempt(copy)


@pytest.mark.slow
def test_on_the_command_line(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if the command does not end with exit code 2 and one line that names the damaged file."""
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
