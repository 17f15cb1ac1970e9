"""memory.py: the bytes it counts are those of real tensors, and where memory ends one line says what would fit."""
import gc
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn

import generate
from app import memory
from draft import Eagle2, Vanilla, load_head
from engine import SPARE, Engine
from formats.config import Config
from model import Llama, load_model
from ops.quantized import Quantized

MODES = [(None, 128), ("int8", 128), ("int8dyn", 128), ("int4", 64), ("int4", 128)]
LLAMA_2_13B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
               "num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 4096}


def held(*things: object) -> int:
    """Bytes of the distinct storages behind tensors, quantised weights and modules."""
    tensors = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, Quantized):
            tensors += [thing.data, thing.scale]
        elif isinstance(thing, Tensor):
            tensors.append(thing)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("mode, group", MODES)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"hidden_size": 48, "head_dim": 10}])
def test_weights_and_cache_are_exact(mode: str | None, group: int, changes: dict, tmp_path: Path) -> None:
    """Guards the arithmetic: padding and scales of int4, an lm_head that is int8 in any mode and no longer tied."""
    bias = "head_dim" in changes
    model = Llama(Config.from_dict(tiny.SHAPE | changes), qkv_bias=bias)
    tiny.randomise(model, 0, torch.float32)
    folder = tiny.save_target(model, tmp_path / "x")
    model = load_model(folder, "cpu", torch.bfloat16, mode, group)
    assert held(model) == memory.weight_bytes(model.cfg, torch.bfloat16, mode, group, bias)
    model.allocate_cache(100, SPARE)
    assert held(model.kv, model.rope) == memory.cache_bytes(model.cfg, 100, torch.bfloat16)


@pytest.mark.parametrize("mode, group", MODES)
@pytest.mark.parametrize("ids", [None, 12])
def test_eagle_is_exact(mode: str | None, group: int, ids: int | None, tmp_path: Path) -> None:
    """Guards what a drafter makes of its head: the embeddings' table, half of fc again, rows of the lm_head."""
    model, head = tiny.pair(0, dtype=torch.float32)
    folder = tiny.save_head(head, tmp_path / "eagle")
    model = load_model(tiny.save_target(model, tmp_path / "x"), "cpu", torch.bfloat16, mode, group)
    (folder / "draft_vocab.json").write_text(json.dumps(list(range(12))))
    head = load_head(folder, model, ids or 0, mode, group)
    drafter = Eagle2(head, model, 8, 3, 3)
    drafter.allocate(100 + SPARE)
    own = () if ids is None else (drafter.lm_head,)
    assert held(head, head.kv, head.rope, drafter.fc, drafter.embedded, *own) == memory.eagle_bytes(
        head.cfg, model.cfg, 100, torch.bfloat16, mode, group, ids)


def test_known_sizes() -> None:
    """Llama-2-13B has 13,015,864,320 weights; of its cache a slot takes 0.82 MB, as of any of its shape."""
    cfg = Config.from_dict(LLAMA_2_13B)
    assert memory.weight_bytes(cfg, torch.bfloat16) == 2 * 13_015_864_320
    assert 0.819e6 < memory.cache_bytes(cfg, 4096, torch.bfloat16) / (4096 + SPARE) < 0.82e6
    assert 13.1e9 < memory.weight_bytes(cfg, torch.bfloat16, "int8") < 13.3e9
    assert 7.1e9 < memory.weight_bytes(cfg, torch.bfloat16, "int4") < 7.3e9


@pytest.mark.parametrize("free, words, fits", [
    (23.6e9, (), ["free: --quantize int8 (17.5 GB) fits"]), (4e9, (), ["a smaller model"]),
    (15e9, (), ["free: --quantize int4 (11.5 GB) fits"]), (10e9, (), ["free: --quantize int4 --max_seq_len 2048 ("]),
    (29e9, (), ["--quantize int8 (", " GB) fits, as does --max_seq_len 2048 ("]),
    (15e9, ("--quantize", "int8"), ["--quantize int4 (", "--max_seq_len 1024 ("]),
    (9e9, ("--quantize", "int4"), ["free: --max_seq_len 512 ("]), (99e9, (), ["--quantize int8 ("])])
def test_advice(free: float, words: tuple, fits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards advice that does not fit either, and the second-best where the best is possible."""
    folder = tmp_path / "Llama-2-13B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_2_13B))
    monkeypatch.setattr(memory, "read_tensors", lambda path: ({}, {}))
    args = generate.parse_args(["--checkpoint", str(folder), "--prompt", "x", *words])
    said = memory.advice(args, "cuda", torch.bfloat16, 4096, int(free))
    assert "\n" not in said and said.startswith("out of GPU memory: Llama-2-13B in ") and all(w in said for w in fits)
    assert "3.5 GB of cache for 4096 slots" in said and f"{free / 1e9:.1f} GB free" in said
    assert words or "26.0 GB of weights" in said


@pytest.mark.parametrize("error, is_memory", [
    (torch.OutOfMemoryError("CUDA out of memory."), True), (RuntimeError("Triton Error [CUDA]: out of memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), True), (RuntimeError("shapes"), False)])
def test_exhausted(error: RuntimeError, is_memory: bool) -> None:
    """Guards the ways to say it, also behind an error that a capture's end raised; and other errors stay themselves."""
    assert memory.exhausted(error) == is_memory
    try:
        try:
            raise error
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as e:
        assert memory.exhausted(e) == is_memory


def out_of_memory(*inputs: object, **options: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines.")


@pytest.mark.parametrize("where", ["load_model", "Llama.allocate_cache", "EagleHead.allocate_cache", "rope_table",
                                   "Engine.verify", "Engine.chunk"])
def test_on_the_command_line(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture) -> None:
    """Guards every place where memory ends: one line, exit code 2, and in a session that goes on the next run works."""
    folder = tiny.save_everything(tmp_path / "x")
    owner = {"load_model": "app.options", "Llama": "model.Llama", "EagleHead": "draft.EagleHead", "rope_table": "model",
             "Engine": "engine.Engine"}[where.partition(".")[0]]
    words = ["generate.py", "--checkpoint", str(folder), "--eagle2", "--device", "cpu", "--prompt", "x",
             "--max_new_tokens", "8", "--max_seq_len", "64"]
    monkeypatch.setattr("sys.argv", words)
    with monkeypatch.context() as broken:
        broken.setattr(f"{owner}.{where.rpartition('.')[2]}", out_of_memory)
        with pytest.raises(SystemExit) as ended:
            generate.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and err.startswith("error: out of memory: x in ") and err.count("\n") == 1
    assert "GB of cache for 64 slots" in err and "for drafting" in err and out == ""
    generate.main()


def test_session_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards a model whose cache could not grow: what it had must still serve the engine that it has, a smaller engine
    can be made, and nothing of the failed one stays in memory. A cache without its table of RoPE would be taken for
    whole, and read beyond its end."""
    model = tiny.target(0, torch.float32)
    engine, ids = Engine(model, Vanilla(), 64), tiny.prompt(0, 9)
    text, made = sum(engine.generate(ids, 20), []), []
    for broken in ("model.rope_table", "torch.Tensor.new_zeros"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, out_of_memory)
            drafter = Vanilla()
            made.append(weakref.ref(drafter))
            with pytest.raises(torch.OutOfMemoryError):
                Engine(model, drafter, 256)
            del drafter
        gc.collect()
        assert made.pop()() is None
        assert sum(engine.generate(ids, 20), []) == text
        assert sum(Engine(model, Vanilla(), 48).generate(ids, 20), []) == text
    longer = Engine(model, Vanilla(), 256)
    assert model.kv.shape[4] == model.rope.shape[1] == 256 + SPARE
    assert sum(longer.generate(ids, 20), []) == text


def test_more_slots_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Guards the real thing, on a CPU: 2**24 slots of a model that would take 4 TB of cache."""
    raw = tiny.SHAPE | {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 64,
                        "head_dim": 1024, "hidden_size": 16}
    folder = tiny.save_everything(tmp_path / "x")
    model = tiny.target(0, torch.float32, **raw)
    tiny.save_target(model, folder)
    args = ["generate.py", "--checkpoint", str(folder), "--device", "cpu", "--prompt", "x", "--max_seq_len", str(2**24)]
    monkeypatch.setattr("sys.argv", args)
    with pytest.raises(SystemExit) as ended:
        generate.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: out of memory") and "--max_seq_len" in err
