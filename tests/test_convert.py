"""convert_hf_checkpoint.py: every kind of Hugging Face folder gives the same result, and a bad one leaves nothing.

tests/formats/test_gguf.py has GGUF files, tests/test_hub.py has downloads.

    python -m pytest tests/test_convert.py
"""
import errno
import json
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from published import FAMILIES, assert_nothing_loads, head_folder, hf_folder, repack, run
from safetensors.torch import load_file, safe_open, save_file

import convert_hf_checkpoint
from app.install import add_head
from convert_hf_checkpoint import convert
from formats.config import Config
from formats.weights import FORMAT
from model import load_model

torch.set_num_threads(1)


# ----- Hugging Face folders ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_file_gives_the_same_folder(family, tmp_path):
    """Fails if a reader loses, reorders or rounds tensors: from shards or from pickles the folder must be the same."""
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
    """Fails if q, k, v or gate, up are fused in a wrong order, a tensor is left out, or rounding is not to nearest."""
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
    """Fails if config or tokenizer files change, other files are copied, or a path of the user gets into a file."""
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
    """Fails if an lm_head that differs from the embedding is lost, or one that is the same is stored twice."""
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
    """Fails if an old checkpoint is refused because it stores the RoPE frequencies."""
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
    ({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}, r"q_proj\.bias is there, but transformers ignores it"),
    ({"model.layers.1.mlp.up_proj.weight": None}, r"missing .*layers\.1\.mlp\.up_proj"),
    ({"lm_head.weight": None}, r"missing .*lm_head"),
    ({"model.layers.1.mlp.up_proj.weight": torch.ones(47, 32)}, r"up_proj.*47, 32.*96, 32"),
    ({"model.layers.1.self_attn.v_proj.weight": torch.ones(32, 16)}, r"v_proj.*32, 16"),
])
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    """Fails if a tensor that the engine does not implement is dropped silently, or if half a model is converted."""
    tensors = {name: tensor for name, tensor in (hf_folder(tmp_path / "hf") | change).items() if tensor is not None}
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "hf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


def test_config_is_refused_before_weights_are_opened(tmp_path, monkeypatch):
    """Fails if the weights are opened before a model that the engine cannot run is refused."""
    hf_folder(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    monkeypatch.setattr(convert_hf_checkpoint, "read_tensors", lambda path: pytest.fail("weights were opened"))
    with pytest.raises(ValueError, match="gemma2"):
        convert(tmp_path / "hf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


# ----- Damaged and hostile sources -----------------------------------------------------------------------------------


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", ["payload", "nested", "list", "garbage", "truncated", "empty"])
def test_pickles_that_are_not_plain_tensors(content, tmp_path, monkeypatch, capsys):
    """Fails if code in a download runs, or if a damaged file ends in a traceback."""
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
    """Fails if a file outside the download can be read, or if the error does not name the missing shard."""
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
    """Fails if a damaged file ends in a traceback, or leaves an incomplete folder."""
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


# ----- Interruption and full disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"),
                                     OSError(errno.EIO, "Input/output error"), ValueError("any")])
def test_interrupted_conversion_leaves_nothing_that_loads(failure, tmp_path, monkeypatch):
    """Fails if an interrupted run leaves an incomplete model that loads."""
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
    """Fails if converting into a good folder again destroys it when the second run fails."""
    tensors = hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    save_file({name: tensors[name] for name in list(tensors)[1:]}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError):
        convert(tmp_path / "hf", tmp_path / "out")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_killed_run_is_cleaned_up_by_the_next(tmp_path):
    """Fails if files that a killed run left stay for ever, or get mixed with new ones."""
    hf_folder(tmp_path / "hf")
    (tmp_path / "out/.eagle2-x.part").mkdir(parents=True)
    (tmp_path / "out/.eagle2-x.part/merges.txt").write_text("stale")
    (tmp_path / "out/merges.txt").write_text("of another model")
    convert(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out/.eagle2-x.part").exists() and not (tmp_path / "out/merges.txt").exists()


def test_weights_are_moved_last(tmp_path, monkeypatch):
    """Fails if a folder loads although the run was killed while its files were moved: the weights must come last."""
    hf_folder(tmp_path / "hf")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda path, target: (moved.append(Path(target).name), replace(path, target)))
    convert(tmp_path / "hf", tmp_path / "out")
    assert len(moved) == 5 and moved[-1] == "model.safetensors"


def test_full_disk_is_noticed_before_and_while_writing(tmp_path, monkeypatch, capsys):
    """Fails if a disk that is too small is noticed late, or ends in a traceback when another program fills it."""
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
    """Fails if --out may be the source, whose weights would be lost."""
    tensors = hf_folder(tmp_path / "hf")
    with pytest.raises(ValueError, match="--out"):
        convert(tmp_path / "hf", tmp_path / "hf/../hf")
    assert load_file(tmp_path / "hf/model.safetensors").keys() == tensors.keys()


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    """Fails if a mistyped path ends in a traceback or asks the network."""
    for source in (tmp_path / "nothing/here", tmp_path):
        assert run(monkeypatch, source, "--out", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and str(source) in error
    assert run(monkeypatch, "--help") == 0
    assert "gguf" in capsys.readouterr().out


def test_converted_already(tmp_path, monkeypatch, capsys):
    """Fails if --out or --dtype is ignored in silence, because the source is a folder that needs no conversion."""
    hf_folder(tmp_path / "hf")
    folder = tmp_path / "out"
    assert run(monkeypatch, tmp_path / "hf", "--out", folder) == 0
    capsys.readouterr()
    for words in (("--out", tmp_path / "other"), ("--dtype", "float32"), ("--out", folder, "--dtype", "bfloat16")):
        assert run(monkeypatch, folder, *words) == 2
        error = capsys.readouterr().err
        assert error == f"error: {folder} is converted already: --out and --dtype are for a source that is not\n"
    assert not (tmp_path / "other").exists()
    assert run(monkeypatch, folder, "--out", tmp_path / "hf/../out") == 0
    assert run(monkeypatch, folder, "--eagle", "") == 2  # as where a shell variable is not set


# ----- Draft heads ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_draft_head_is_copied_as_published(suffix, tmp_path, monkeypatch):
    """Fails if a head is changed when it is copied, or if adding a head converts the folder a second time."""
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
    before = model.st_ino, model.st_mtime_ns, model.st_size  # not the time of the last access
    other = head_folder(tmp_path / "other", "bin" if suffix == "safetensors" else "safetensors")
    assert run(monkeypatch, tmp_path / "out", "--eagle", other) == 0
    model = (tmp_path / "out/model.safetensors").stat()
    assert (model.st_ino, model.st_mtime_ns, model.st_size) == before
    for name in (weights, "acceptance.json", "draft_vocab.json"):
        assert not (tmp_path / "out/eagle" / name).exists()  # a loader would take the old head's file for the new one's


@pytest.mark.parametrize("changes, message", [
    ({"midlayer.hidden_norm.weight": torch.ones(32)}, "first layer"), ({"d2t": torch.ones(8)}, "first layer"),
    ({"fc.weight": torch.ones(32, 96)}, r"fc\.weight"), ({"fc.weight": None}, r"fc\.weight"),
    ({"layers.0.mlp.down_proj.weight": None}, r"layer.*w2"),
    ({"layers.1.mlp.down_proj.weight": torch.ones(1)}, r"layers\.1")])
def test_heads_of_another_kind_are_refused(changes, message, tmp_path):
    """Fails if a head is copied that then does not load, or loads and drafts nonsense."""
    hf_folder(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        add_head(head_folder(tmp_path / "head", **changes), tmp_path / "out")
    assert not (tmp_path / "out/eagle").exists()


# ----- What generate.py will find ------------------------------------------------------------------------------------


def test_what_works_in_part_is_said(tmp_path, capsys):
    """Fails if a template that does not compile or refuses a question, tokens that the model lacks, or a missing
    tokenizer are found only by generate.py, or stop a conversion that is of use."""
    for name, changes, said in (
            ("template", {"chat_template.jinja": "{% do %}"}, "broken chat template"),
            ("refusal", {"chat_template.jinja": "{{ raise_exception('no system message') }}"}, "no system message"),
            ("beyond", {"added_tokens.json": '{"<pad>": 64, "<a>": 65, "<b>": 66, "<c>": 67}'},
             "68 ids, the model 64: prompts with <a>, <b>, <c>, ... will be refused"),
            ("tokenizer", {"tokenizer.json": None}, "no tokenizer.json and no tokenizer.model"),
            ("nothing", {}, "")):
        hf_folder(tmp_path / name)
        for file, text in changes.items():
            if text is None:
                (tmp_path / name / file).unlink()
            else:
                (tmp_path / name / file).write_text(text)
        convert(tmp_path / name, tmp_path / f"{name} out")
        lines = [line for line in capsys.readouterr().err.splitlines() if "converting" not in line and line]
        assert len(lines) == bool(said) and said in "".join(lines) and ".part" not in "".join(lines)
        load_model(tmp_path / f"{name} out")


@pytest.mark.parametrize("file, text", [
    ("tokenizer.json", '{"any": "thing"}'), ("tokenizer_config.json", "{"), ("added_tokens.json", "["),
    ("generation_config.json", '{"eos_token_id": "x"}')])
def test_what_generate_would_refuse(file, text, tmp_path, monkeypatch, capsys):
    """Fails if the converter is content with files that generate.py refuses, or names a file that is gone."""
    hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / file).write_text(text)
    assert run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(tmp_path / "hf") in error and ".part" not in error
    assert not (tmp_path / "out").exists()


def test_one_layer_is_run(tmp_path, monkeypatch):
    """Fails if weights that are no numbers are converted without a word, or if the check reads more than one layer."""
    tensors = hf_folder(tmp_path / "hf")
    names = []
    real = convert_hf_checkpoint.fill
    monkeypatch.setattr(convert_hf_checkpoint, "fill", lambda model, tensors, *rest: (names.extend(tensors),
                                                                                      real(model, tensors, *rest)))
    convert(tmp_path / "hf", tmp_path / "out")
    assert "layers.0.w2.weight" in names and not [name for name in names if name.startswith("layers.1.")]
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "hf/model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        convert(tmp_path / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
