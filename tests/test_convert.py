"""convert_hf_checkpoint.py: every kind of source gives the same folder, and a bad one leaves none. CPU, no network.

    python -m pytest tests/test_convert.py
"""
import errno
import hashlib
import http.server
import json
import os
import shutil
import struct
import sys
import threading
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gguf
import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file
from tokenizers import pre_tokenizers

import convert_hf_checkpoint
from convert_hf_checkpoint import add_eagle, convert, main
from formats.config import Config
from formats.weights import FORMAT
from model import load_model
from tokenizer import Tokenizer

torch.set_num_threads(1)
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
}


def hf_folder(folder: Path, family: str = "llama") -> dict[str, torch.Tensor]:
    """A random Hugging Face checkpoint in one model.safetensors, with other files beside it. Returns its tensors."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():  # zero biases and unit norms would hide a swap
        torch.nn.init.normal_(parameter)
    model.config.save_pretrained(folder)
    tied = model.config.tie_word_embeddings
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_text("not wanted")
    return tensors


def repack(folder: Path, tensors: dict[str, torch.Tensor], kind: str) -> None:
    """The same weights as `kind`: one file or two shards with an index, of safetensors or of pickles."""
    (folder / "model.safetensors").unlink()
    suffix = "bin" if "bin" in kind else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    write = torch.save if suffix == "bin" else partial(save_file, metadata={"format": "pt"})
    if "sharded" not in kind:
        return write(tensors, folder / f"{stem}.{suffix}")
    names, shards = sorted(tensors), [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for i, shard in enumerate(shards):
        write({name: tensors[name] for name in names[i::2]}, folder / shard)
    index = {"metadata": {}, "weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the script; 0 if it returns."""
    monkeypatch.setattr(sys, "argv", ["convert_hf_checkpoint.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


def assert_nothing_loads(out: Path) -> None:
    assert not [path for path in out.rglob("*") if path.is_file()] if out.exists() else True
    with pytest.raises((OSError, ValueError)):
        load_model(out)


# ----- Hugging Face folders


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_file_gives_the_same_folder(family, tmp_path):
    """Guards against a reader that loses, reorders or re-rounds tensors: shards, pickles, several dtypes."""
    tensors = hf_folder(tmp_path / "hf", family)
    convert(tmp_path / "hf", tmp_path / "one", torch.bfloat16, "same")
    for kind in ("sharded", "bin", "sharded bin"):
        shutil.copytree(tmp_path / "hf", tmp_path / kind)
        repack(tmp_path / kind, tensors, kind)
        convert(tmp_path / kind, tmp_path / f"{kind} out", torch.bfloat16, "same")
        names = sorted(path.name for path in (tmp_path / "one").iterdir())
        assert names == sorted(path.name for path in (tmp_path / f"{kind} out").iterdir())
        for name in names:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / f"{kind} out" / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_tensors_are_their_pieces(family, dtype, tmp_path):
    """Guards against a wrong order of q, k, v or gate, up, a forgotten tensor, and rounding other than to nearest."""
    source = dict(hf_folder(tmp_path / "hf", family))
    convert(tmp_path / "hf", tmp_path / "out", dtype)
    ours, config = load_file(tmp_path / "out/model.safetensors"), Config.load(tmp_path / "out")
    expected = {"embed.weight": source.pop("model.embed_tokens.weight"), "norm.weight": source.pop("model.norm.weight")}
    if "tied" not in family and family != "qwen2":
        expected["lm_head.weight"] = source.pop("lm_head.weight")
    for i in range(config.num_layers):
        def take(name, i=i):
            return source.pop(f"model.layers.{i}.{name}")

        layer = {"attn_norm.weight": take("input_layernorm.weight"), "wo.weight": take("self_attn.o_proj.weight"),
                 "wqkv.weight": torch.cat([take(f"self_attn.{x}_proj.weight") for x in "qkv"]),
                 "mlp_norm.weight": take("post_attention_layernorm.weight"), "w2.weight": take("mlp.down_proj.weight"),
                 "w13.weight": torch.cat([take("mlp.gate_proj.weight"), take("mlp.up_proj.weight")])}
        if family == "qwen2":
            layer["wqkv.bias"] = torch.cat([take(f"self_attn.{x}_proj.bias") for x in "qkv"])
        if family == "qwen3":
            layer |= {f"{x}_norm.weight": take(f"self_attn.{x}_norm.weight") for x in "qk"}
        expected |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    assert not source and ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == dtype and torch.equal(tensor, expected[name].to(dtype)), name
    load_model(tmp_path / "out")


def test_files_and_metadata(tmp_path, monkeypatch):
    """Guards against an edited config or tokenizer, files nobody asked for, and the user's paths in a shared file."""
    hf_folder(tmp_path / "org/name")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, tmp_path / "org/name") == 0
    out = tmp_path / "checkpoints/org/name"
    assert {path.name for path in out.iterdir()} == {"config.json", "generation_config.json", "model.safetensors",
                                                     "tokenizer.json", "chat_template.jinja"}
    for name in {path.name for path in out.iterdir()} - {"model.safetensors"}:
        assert (out / name).read_bytes() == (tmp_path / "org/name" / name).read_bytes()
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": FORMAT, "source": "org/name", "dtype": "bfloat16"}
    header = struct.unpack("<Q", (out / "model.safetensors").read_bytes()[:8])[0]
    assert header % 8 == 0  # unaligned data is slow, and an error on some machines


def test_lm_head_of_a_tied_model(tmp_path):
    """Guards against losing a head that differs from the embedding, and against storing one that does not."""
    tensors = hf_folder(tmp_path / "hf", "llama-tied")
    copy = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": copy}, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "same")
    assert "lm_head.weight" not in load_file(tmp_path / "same/model.safetensors")
    assert Config.load(tmp_path / "same").tie_word_embeddings
    head = torch.randn_like(copy)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "other", torch.float32)
    assert torch.equal(load_file(tmp_path / "other/model.safetensors")["lm_head.weight"], head)
    assert not Config.load(tmp_path / "other").tie_word_embeddings
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"]  # the source is never touched


def test_rotary_buffers_are_ignored(tmp_path):
    """Guards against refusing old checkpoints, which store the RoPE frequencies."""
    tensors = hf_folder(tmp_path / "hf")
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        tensors[name] = torch.ones(4)
    save_file(tensors, tmp_path / "hf/model.safetensors")
    convert(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("change, message", [
    ({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}, r"not implemented .*o_proj\.bias"),
    ({"model.layers.1.mlp.experts.0.gate_proj.weight": torch.ones(2, 2)}, r"not implemented .*experts"),
    ({"model.layers.2.input_layernorm.weight": torch.ones(32)}, r"not implemented .*layers\.2"),
    ({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}, r"not implemented .*q_norm"),
    ({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}, r"missing .*layers\.0\.self_attn\.q_proj\.bias"),
    ({"model.layers.1.mlp.up_proj.weight": None}, r"missing .*layers\.1\.mlp\.up_proj"),
    ({"lm_head.weight": None}, r"missing .*lm_head"),
    ({"model.layers.1.mlp.up_proj.weight": torch.ones(47, 32)}, r"up_proj.*47, 32.*96, 32"),
    ({"model.layers.1.self_attn.v_proj.weight": torch.ones(32, 16)}, r"v_proj.*32, 16"),
])
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    """Guards against silently dropping what the engine does not implement, and against half a model."""
    tensors = {name: tensor for name, tensor in (hf_folder(tmp_path / "hf") | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


def test_config_is_refused_before_weights_are_opened(tmp_path, monkeypatch):
    """Guards against spending an hour on a model that the engine cannot run."""
    hf_folder(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    monkeypatch.setattr(convert_hf_checkpoint, "read_tensors", lambda path: pytest.fail("weights were opened"))
    with pytest.raises(ValueError, match="gemma2"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


# ----- damaged and hostile sources


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["payload", "nested", "list", "garbage", "truncated", "empty"])
def test_pickles_that_are_not_plain_tensors(content, tmp_path, monkeypatch, capsys):
    """Guards against running code from a download, and against tracebacks for damaged files."""
    tensors = hf_folder(tmp_path / "hf")
    repack(tmp_path / "hf", tensors, "bin")
    path = tmp_path / "hf/pytorch_model.bin"
    data = path.read_bytes()
    if content == "payload":
        torch.save(tensors | {"model.norm.weight": Payload(tmp_path / "executed")}, path)
    elif content in ("nested", "list"):
        torch.save({"state_dict": tensors} if content == "nested" else list(tensors.values()), path)
    else:
        path.write_bytes({"garbage": b"\x80\x02garbage", "truncated": data[:len(data) // 2], "empty": b""}[content])
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    assert not (tmp_path / "executed").exists()
    error = capsys.readouterr().err
    assert str(tmp_path / "hf") in error and error.count("\n") == 1 and error.startswith("error: ")
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("entry", ["../secret.safetensors", "/etc/passwd", "..", "sub/model.safetensors",
                                   "absent.safetensors", ["a list"], 3])
def test_index_names_only_files_of_its_folder(entry, tmp_path, monkeypatch, capsys):
    """Guards against reading files outside the download, and says which shard is missing after a broken one."""
    tensors = hf_folder(tmp_path / "hf")
    repack(tmp_path / "hf", tensors, "sharded")
    (tmp_path / "hf/sub").mkdir()
    for path in (tmp_path / "secret.safetensors", tmp_path / "hf/sub/model.safetensors"):
        save_file(tensors, path)
    index = tmp_path / "hf/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, entry)}))
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(entry) in error and str(index) in error
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("file, content", [
    ("model.safetensors", b"\x10"), ("model.safetensors", b""), ("model.safetensors", None), ("config.json", b"{"),
    ("config.json", b"[]"), ("config.json", None), ("model.safetensors.index.json", b"{}"),
    ("model.safetensors.index.json", b"[1"), ("model.safetensors.index.json", b'{"weight_map": [1]}')])
def test_damaged_files_end_in_one_line(file, content, tmp_path, monkeypatch, capsys):
    """Guards against tracebacks, and against a folder that half exists."""
    hf_folder(tmp_path / "hf")
    if "index" in file:
        (tmp_path / "hf/model.safetensors").unlink()
    (tmp_path / "hf" / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "hf" / file).write_bytes(content)
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(tmp_path / "hf") in error
    assert_nothing_loads(tmp_path / "out")


# ----- interruption and full disks


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"),
                                     OSError(errno.EIO, "Input/output error"), ValueError("any")])
def test_interrupted_conversion_leaves_nothing_that_loads(failure, tmp_path, monkeypatch):
    """Guards against a half-written model that a later run takes for a whole one."""
    hf_folder(tmp_path / "hf")
    calls = []

    class Bar:
        def __init__(self, **options): pass
        def __enter__(self): return self
        def __exit__(self, *why): pass

        def update(self, n):
            calls.append(n)
            if len(calls) == 7:
                raise failure

    monkeypatch.setattr("formats.weights.tqdm", Bar)
    with pytest.raises(KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ValueError):
        convert(tmp_path / "hf", tmp_path / "out")
    assert len(calls) == 7
    assert_nothing_loads(tmp_path / "out")
    monkeypatch.undo()
    convert(tmp_path / "hf", tmp_path / "out")
    load_model(tmp_path / "out")


def test_failed_conversion_keeps_an_earlier_one(tmp_path, monkeypatch):
    """Guards against destroying a good folder when converting into it again fails."""
    tensors = hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save_file({name: tensors[name] for name in list(tensors)[1:]}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError):
        convert(tmp_path / "hf", tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_killed_run_is_cleaned_up_by_the_next(tmp_path):
    """Guards against gigabytes that a killed run leaves for ever, and against mixing them with new files."""
    hf_folder(tmp_path / "hf")
    (tmp_path / "out/.part").mkdir(parents=True)
    (tmp_path / "out/.part/merges.txt").write_text("stale")
    (tmp_path / "out/merges.txt").write_text("of another model")
    convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out/.part").exists() and not (tmp_path / "out/merges.txt").exists()


def test_config_is_moved_last(tmp_path, monkeypatch):
    """Guards against a folder that looks whole although a kill came between two of its files."""
    hf_folder(tmp_path / "hf")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda path, target: (moved.append(Path(target).name), replace(path, target)))
    convert(tmp_path / "hf", tmp_path / "out")
    assert len(moved) == 5 and moved[-1] == "config.json"


def test_full_disk_is_noticed_before_and_while_writing(tmp_path, monkeypatch, capsys):
    """Guards against filling a disk for minutes, and against a traceback when another program fills it."""
    hf_folder(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "new/out") == 2
    assert "GB needed, 0.00 GB free" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()  # no empty folders either
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    if not Path("/dev/full").exists():
        return
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *rest, **options: real(
        "/dev/full" if str(path).endswith(".part/model.safetensors") else path, *rest, **options))
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert error.startswith("error: ") and "No space left on device" in error and str(tmp_path / "out") in error
    monkeypatch.undo()
    assert_nothing_loads(tmp_path / "out")


def test_source_is_not_overwritten(tmp_path):
    """Guards against --out pointing at the source, whose weights would be lost."""
    tensors = hf_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match="--out"):
        convert(tmp_path / "hf", tmp_path / "hf/../hf")
    assert load_file(tmp_path / "hf/model.safetensors").keys() == tensors.keys()


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    """Guards against tracebacks for typing errors, without asking the network."""
    for source in (tmp_path / "nothing/here", tmp_path):
        assert run(monkeypatch, source, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(source) in error
    assert run(monkeypatch, "--help") == 0
    assert "gguf" in capsys.readouterr().out


# ----- draft heads


def head_folder(folder: Path, suffix: str = "safetensors", **changes: torch.Tensor | None) -> Path:
    """An EAGLE-2 head for hidden size 32 with the published names; a change of None drops that tensor."""
    folder.mkdir()
    shapes = {"fc.weight": (32, 64), "layers.0.self_attn.q_proj.weight": (32, 32), "embed_tokens.weight": (64, 32),
              "layers.0.self_attn.k_proj.weight": (16, 32), "layers.0.self_attn.v_proj.weight": (16, 32),
              "layers.0.self_attn.o_proj.weight": (32, 32), "layers.0.mlp.gate_proj.weight": (48, 32),
              "layers.0.mlp.up_proj.weight": (48, 32), "layers.0.mlp.down_proj.weight": (32, 48),
              "layers.0.post_attention_layernorm.weight": (32,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()} | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if suffix == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    config = {key: value for key, value in SIZES.items() if key != "pad_token_id"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "num_hidden_layers": 1}))
    (folder / "README.md").write_text("not wanted")
    return folder


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_draft_head_is_copied_as_published(suffix, tmp_path, monkeypatch):
    """Guards against re-encoding a head, and against converting a converted folder again when only it is added."""
    hf_folder(tmp_path / "hf")
    head = head_folder(tmp_path / "head", suffix)
    (head / "draft_vocab.json").write_text(json.dumps(list(range(12))))
    (head / "acceptance.json").write_text("{}")
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out", "--eagle", head) == 0
    weights = "pytorch_model.bin" if suffix == "bin" else "model.safetensors"
    names = {"config.json", "draft_vocab.json", "acceptance.json", weights}
    assert {path.name for path in (tmp_path / "out/eagle").iterdir()} == names
    for name in names:
        assert (tmp_path / "out/eagle" / name).read_bytes() == (head / name).read_bytes()
    model = (tmp_path / "out/model.safetensors").stat()
    other = head_folder(tmp_path / "other", "bin" if suffix == "safetensors" else "safetensors")
    assert run(monkeypatch, tmp_path / "out", "--eagle", other) == 0
    assert (tmp_path / "out/model.safetensors").stat() == model
    for name in (weights, "acceptance.json"):
        assert not (tmp_path / "out/eagle" / name).exists()  # a loader would take the old head's for the new one's


@pytest.mark.parametrize("changes, message", [
    ({"midlayer.hidden_norm.weight": torch.ones(32)}, "EAGLE-3"), ({"d2t": torch.ones(8)}, "EAGLE-3"),
    ({"fc.weight": torch.ones(32, 96)}, r"fc\.weight"), ({"fc.weight": None}, r"fc\.weight"),
    ({"layers.0.mlp.down_proj.weight": None}, r"layer.*w2"),
    ({"layers.1.mlp.down_proj.weight": torch.ones(1)}, r"layers\.1")])
def test_heads_of_another_kind_are_refused(changes, message, tmp_path):
    """Guards against a head that is copied and then does not load, or loads and drafts nonsense."""
    hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        add_eagle(head_folder(tmp_path / "head", **changes), tmp_path / "out")
    assert not (tmp_path / "out/eagle").exists()


# ----- GGUF

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 2, 4, 2, 64, 384
GGUF_TO_HF = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
              "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def raw_rows(rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random rows of type `kind`, as a file holds them. gguf cannot quantise to Q4_K and Q6_K: there the integers are
    random bytes, and only the half-precision scales are given values that are numbers."""
    if kind.name == "I8":
        return rng.integers(-9, 9, (rows, columns), dtype=np.int8)
    if kind.name not in ("Q4_K", "Q6_K"):
        return gguf.quantize(rng.standard_normal((rows, columns), dtype=np.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    scales = slice(0, 4) if kind.name == "Q4_K" else slice(208, 210)
    count = (scales.stop - scales.start) // 2
    blocks[..., scales] = rng.uniform(0.001, 0.01, (rows, columns // block, count)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: (half, j) -> (j, half), within a head."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def bpe_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges of a small byte-level BPE that tells the ways of cutting text into words apart."""
    merges = ["1 2", "12 3", "123 4", "Ġ 1", "' S", "Ġ h", "Ġh i"]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + ["xyz"]
    types, unused = [1] * len(tokens), VOCAB - 4 - len(tokens)
    tokens += [f"<unused{i}>" for i in range(unused)] + ["<|im_start|>", "<|im_end|>", "<|eot|>", "<tool>"]
    return tokens, types + [5] * unused + [3, 3, 3, 4], merges


def bpe_metadata(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens, types, merges = bpe_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(VOCAB - 4)
    writer.add_eos_token_id(VOCAB - 3)
    writer.add_eot_token_id(VOCAB - 2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")


def write_gguf(path: Path, arch: str = "llama", kind: str = "F32", tied: bool = False, tokenizer=None,
               extra=lambda writer: None) -> dict[str, torch.Tensor]:
    """A small random GGUF file. Returns its weights in Hugging Face's names and row order, dequantised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer, rng, kind = gguf.GGUFWriter(path, arch), np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    if arch == "llama":
        writer.add_rope_dimension_count(HEAD_DIM)
    if arch == "qwen3":
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
    (tokenizer or partial(bpe_metadata, pre="smollm"))(writer)
    f32 = gguf.GGMLQuantizationType.F32
    tensors, q, kv = {}, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN), "attn_v.weight": (kv, HIDDEN),
              "attn_output.weight": (HIDDEN, q), "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "attn_norm.weight": HIDDEN,
              "ffn_up.weight": (INTERMEDIATE, HIDDEN), "ffn_down.weight": (HIDDEN, INTERMEDIATE),
              "ffn_norm.weight": HIDDEN}
    if arch == "qwen2":
        shapes |= {"attn_q.bias": q, "attn_k.bias": kv, "attn_v.bias": kv}
    if arch == "qwen3":
        shapes |= {"attn_q_norm.weight": HEAD_DIM, "attn_k_norm.weight": HEAD_DIM}
    every = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": HIDDEN} | (
        {} if tied else {"output.weight": (VOCAB, HIDDEN)})
    every |= {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in every.items():
        vector = isinstance(shape, int)
        raw = raw_rows(rng, f32 if vector else kind, *((1, shape) if vector else shape))
        value = torch.from_numpy(raw if raw.dtype == np.int8 else gguf.dequantize(raw, f32 if vector else kind).copy())
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        stored = permute(raw, heads) if arch == "llama" and heads else raw
        writer.add_tensor(name, stored[0] if vector else stored, raw_dtype=f32 if vector else kind)
        _, layer, *rest = name.split(".") if name.startswith("blk.") else ("", "", name)
        top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
               "output.weight": "lm_head.weight"}
        hf = f"model.layers.{layer}.{GGUF_TO_HF[rest[0]]}.{rest[1]}" if layer else top[name]
        tensors[hf] = value[0] if vector else value
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def as_hf(folder: Path, tensors: dict[str, torch.Tensor], arch: str, tied: bool) -> None:
    """The Hugging Face folder that a GGUF file of write_gguf came from."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config[arch](vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
                 rope_theta=500000.0, max_position_embeddings=4096, tie_word_embeddings=tied).save_pretrained(folder)


@pytest.mark.parametrize("kind", TYPES)
def test_gguf_types(kind, tmp_path):
    """Guards against a wrong block format and against q and k rows left in llama.cpp's order."""
    tensors = write_gguf(tmp_path / "a.gguf", kind=kind)
    as_hf(tmp_path / "hf", tensors, "llama", tied=False)
    convert(tmp_path / "a.gguf", tmp_path / "ours")
    convert(tmp_path / "hf", tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].isfinite().all() for name in ours)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_architectures(arch, tied, tmp_path):
    """Guards against permuting Qwen, losing biases or q/k norms, and a config that differs from the original's."""
    tensors = write_gguf(tmp_path / "a.gguf", arch, tied=tied)
    as_hf(tmp_path / "hf", tensors, arch, tied)
    convert(tmp_path / "a.gguf", tmp_path / "ours", torch.float32)
    convert(tmp_path / "hf", tmp_path / "theirs", torch.float32)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert Config.load(tmp_path / "ours") == Config.load(tmp_path / "theirs")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "ours")  # so that other programs can read it too
    assert config.rope_parameters["rope_theta"] == 500000.0 and config.rms_norm_eps == 1e-5
    assert (config.bos_token_id, config.eos_token_id, config.head_dim) == (VOCAB - 4, VOCAB - 3, HEAD_DIM)
    with safe_open(tmp_path / "ours/model.safetensors", "pt") as file:
        assert file.metadata()["source"] == "a.gguf"


def test_gguf_is_dequantised_one_tensor_at_a_time(tmp_path):
    """Guards against needing the memory of the whole model in fp32."""
    tensors = write_gguf(tmp_path / "a.gguf", kind="F16")
    sizes = [4 * tensor.numel() for tensor in tensors.values()]
    tracemalloc.start()  # numpy reports to it
    try:
        convert(tmp_path / "a.gguf", tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(sizes) < peak < 3 * max(sizes) + 500_000 < sum(sizes) / 2


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_rope_scaling_is_recovered_or_refused(factor, tmp_path):
    """Guards against dropping Llama 3's scaling (long texts go wrong without a word), and against guessing one."""
    rope = LLAMA3 | {"factor": factor}
    config = transformers.LlamaConfig(**SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64},
                                      rope_parameters=rope)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    divisors = (plain / scaled).numpy()
    write_gguf(tmp_path / "a.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    convert(tmp_path / "a.gguf", tmp_path / "out")
    expected = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    assert Config.load(tmp_path / "out").rope_scaling == pytest.approx(expected)
    divisors[20] *= 1.01
    write_gguf(tmp_path / "b.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        convert(tmp_path / "b.gguf", tmp_path / "other")
    assert_nothing_loads(tmp_path / "other")


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize("change, message", [
    ({"arch": "gemma"}, "gemma"), ({"extra": yarn}, "yarn"), ({"kind": "I8"}, "I8"),
    ({"tokenizer": partial(bpe_metadata, pre="tekken")}, "tekken"),
    ({"tokenizer": partial(bpe_metadata, pre="default")}, "default"),
    ({"tokenizer": lambda writer: writer.add_tokenizer_model("gpt2")}, r"tokenizer\.ggml"),
    ({"tokenizer": lambda writer: (bpe_metadata(writer, "qwen2"), writer.add_uint16("split.count", 3))}, "3 file"),
    ({"extra": lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 2), np.float32))}, "_exps")])
def test_gguf_that_is_not_supported_is_named(change, message, tmp_path):
    """Guards against silently wrong text: an unknown pre-tokenizer or RoPE still runs, only worse."""
    write_gguf(tmp_path / "a.gguf", **change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("cut", [0, 3, 100, 0.5, 0.99])
def test_truncated_gguf_ends_in_one_line(cut, tmp_path, monkeypatch, capsys):
    """Guards against tracebacks for an interrupted download, and against using what there is of it."""
    write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:cut if isinstance(cut, int) else int(cut * len(data))])
    assert run(monkeypatch, tmp_path / "a.gguf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "a.gguf" in error
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.parametrize("pre, pieces", [
    ("smollm", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T ' S", "e\u0301": "e Ì ģ", "xyz": "x y z"}),
    ("gpt-2", {"1234": "1234", " 1": "Ġ1", "IT'S": "I T ' S", "e\u0301": "e Ì ģ", "xyz": "x y z"}),
    ("llama-bpe", {"1234": "123 4", " 1": "Ġ 1", "IT'S": "I T 'S", "e\u0301": "e Ì ģ", "xyz": "xyz"}),
    ("qwen2", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T 'S", "e\u0301": "Ã ©", "xyz": "x y z"})])
def test_gguf_byte_level_tokenizer(pre, pieces, tmp_path):
    """Guards against cutting text into words the wrong way: the ids stay valid, the model just reads them badly."""
    write_gguf(tmp_path / "a.gguf", tokenizer=partial(bpe_metadata, pre=pre))
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokens = bpe_vocabulary()[0]
    ours, theirs = Tokenizer(tmp_path / "out"), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    bos = [VOCAB - 4] if pre == "llama-bpe" else []
    for text, expected in (pieces | {" hi": "Ġhi"}).items():
        ids = [tokens.index(piece) for piece in expected.split()]
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert ours.encode(text) == theirs(text)["input_ids"] == bos + ids
    mixed = "<|im_start|>é 漢字 <tool>\n\n  x<|im_end|>"
    ids = ours.encode(mixed, add_special_tokens=False)
    assert ids[0] == VOCAB - 4 and ids[-1] == VOCAB - 3 and VOCAB - 1 in ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "é 漢字 <tool>\n\n  x"
    assert {VOCAB - 3, VOCAB - 2} <= ours.stop_ids and ours.has_chat_template


def test_gguf_sentencepiece_tokenizer(tmp_path):
    """Guards against merges in the wrong order, a lost byte fallback, and a lost or doubled leading space."""
    letters = "".join(np.random.default_rng(1).choice(list("the cats"), 9000))  # so that merges compete
    (tmp_path / "text").write_text("\n".join(letters[i:i + 60] for i in range(0, 9000, 60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<tool>"], character_coverage=1.0, num_threads=1)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    order = np.random.default_rng(0).permutation(VOCAB).tolist()  # so that ids are not in the order of the scores

    def kind(i: int) -> int:
        flags = {2: spm.is_unknown(i), 3: spm.is_control(i), 6: spm.is_byte(i), 4: spm.id_to_piece(i) == "<tool>"}
        return next((kind for kind, flag in flags.items() if flag), 1)

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([spm.id_to_piece(i) for i in order])
        writer.add_token_scores([spm.get_score(i) for i in order])
        writer.add_token_types([kind(i) for i in order])
        writer.add_bos_token_id(order.index(spm.bos_id()))
        writer.add_eos_token_id(order.index(spm.eos_id()))
        writer.add_unk_token_id(order.index(spm.unk_id()))

    write_gguf(tmp_path / "a.gguf", tokenizer=metadata)
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    for line in ("the cat", " the  cats", "77 bones.", "naïve 漢字 😀", "a\n\tb", "", "cats<tool>", letters[:500]):
        ids = tokenizer.encode(line, add_special_tokens=False)
        assert ids == [order.index(i) for i in spm.encode(line)], line
        assert tokenizer.encode(line) == [order.index(spm.bos_id()), *ids]
        assert tokenizer.decode(ids) == line


# ----- the hub, played by a small server


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub: a dict from repository to its folder, or to the error that it answers with."""
    repos: dict[str, Path | tuple[int, str]] = {}
    asked: list[str] = []
    sent: list[tuple[int, int]] = []  # of weights: from which byte, of how many

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
            repo = repos.get(name, (401, "RepoNotFound"))
            if isinstance(repo, tuple):
                return self.answer(repo[0], X_Error_Code=repo[1], X_Error_Message="no")
            files = sorted(file.name for file in repo.iterdir())
            if "/tree/" in path:
                tree = [{"type": "file", "path": file, "size": (repo / file).stat().st_size,
                         "oid": hashlib.sha1((repo / file).read_bytes()).hexdigest()} for file in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if path.startswith("/api/"):
                info = {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [{"rfilename": f} for f in files],
                        "private": False, "downloads": 0, "likes": 0, "tags": []}
                return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            file = repo / path.rsplit("/", 1)[1]
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            data = file.read_bytes()
            if self.command == "GET":
                asked.append(file.name)
            half = self.command == "GET" and (repo / "BREAK").exists() and file.suffix == ".safetensors"
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            if self.command == "GET" and file.suffix == ".safetensors":
                sent.append((start, len(data)))
            end = len(data) // 2 if half else len(data)
            self.answer(206 if start else 200, data[start:max(start, end)], len(data) - start, X_Repo_Commit="0" * 40,
                        ETag=f'"{hashlib.sha1(data).hexdigest()}"', **(
                            {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}))
            self.close_connection = True

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(convert_hf_checkpoint, "snapshot_download",
                        partial(api.snapshot_download, cache_dir=tmp_path / "cache", max_workers=1))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield SimpleNamespace(repos=repos, asked=asked, sent=sent, server=server)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin", "sharded bin"])
def test_hub_download(kind, hub, tmp_path, monkeypatch):
    """Guards against downloading the weights twice, in two formats, or the files of other programs."""
    tensors = hf_folder(tmp_path / "repo")
    convert(tmp_path / "repo", tmp_path / "expected")
    if kind != "safetensors":
        repack(tmp_path / "repo", tensors, kind)
    if "bin" not in kind:
        torch.save({}, tmp_path / "repo/pytorch_model.bin")
    save_file({}, tmp_path / "repo/consolidated.safetensors")
    hub.repos |= {"org/name": tmp_path / "repo", "org/head": head_folder(tmp_path / "head", "bin")}
    assert run(monkeypatch, "org/name", "--eagle", "org/head") == 0
    out = tmp_path / "checkpoints/org/name"
    ours, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "expected"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata()["source"] == "org/name"
    assert (out / "eagle/pytorch_model.bin").read_bytes() == (tmp_path / "head/pytorch_model.bin").read_bytes()
    assert not {"README.md", "consolidated.safetensors"} & set(hub.asked)
    if "bin" not in kind:
        assert hub.asked.count("pytorch_model.bin") == 1  # the head's


def test_hub_model_is_refused_before_its_weights(hub, tmp_path, monkeypatch, capsys):
    """Guards against downloading gigabytes of a model that the engine cannot run."""
    hf_folder(tmp_path / "repo")
    config = json.loads((tmp_path / "repo/config.json").read_text()) | {"model_type": "mixtral"}
    (tmp_path / "repo/config.json").write_text(json.dumps(config))
    hub.repos["org/name"] = tmp_path / "repo"
    assert run(monkeypatch, "org/name") == 2
    assert "mixtral" in capsys.readouterr().err and hub.asked == ["config.json"]


@pytest.mark.parametrize("answer, message", [((403, "GatedRepo"), "gated"), ((401, "RepoNotFound"), "neither a path"),
                                             ((500, ""), "failed"), (None, "failed")])
def test_hub_errors_name_the_page(answer, message, hub, monkeypatch, capsys):
    """Guards against a page of traceback where the user only has to log in, or to correct a name."""
    hub.repos["org/name"] = answer
    if answer is None:  # nobody there at all
        hub.server.shutdown()
        hub.server.server_close()
    assert run(monkeypatch, "org/name") == 2
    error = capsys.readouterr().err
    assert message in error and "https://huggingface.co/org/name" in error and error.count("\n") == 1
    assert ("hf auth login" in error) == (message != "failed")


def test_interrupted_download_is_an_error_and_goes_on(hub, tmp_path, monkeypatch, capsys):
    """Guards against converting half a download, and against having to clean a cache by hand."""
    hf_folder(tmp_path / "repo")
    (tmp_path / "repo/BREAK").touch()
    hub.repos["org/name"] = tmp_path / "repo"
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(monkeypatch, "org/name") == 2
    assert "error: org/name" in capsys.readouterr().err and not (tmp_path / "checkpoints").exists()
    (tmp_path / "repo/BREAK").unlink()
    assert run(monkeypatch, "org/name") == 0
    load_model(tmp_path / "checkpoints/org/name")
    assert hub.asked.count("config.json") == 1  # what was whole is kept


def test_cut_connection_is_taken_up_again(hub, tmp_path, monkeypatch):
    """Guards gigabytes fetched twice where the line breaks in the middle of a file: the rest is asked for, and fits."""
    hf_folder(tmp_path / "repo")
    (tmp_path / "repo/BREAK").touch()
    hub.repos["org/name"] = tmp_path / "repo"
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / "repo/BREAK").unlink())  # between two tries
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    assert run(monkeypatch, "org/name") == 0
    (first, size), (second, _) = hub.sent
    assert first == 0 and size // 2 - 4096 < second <= size // 2
    load_model(tmp_path / "checkpoints/org/name")
