"""model.py and formats/config.py against transformers: the same logits for every family, starting from the files; and
what is refused."""
import json
import math
import os
from pathlib import Path

import gguf
import pytest
import tiny
import torch
import transformers
from conftest import all_cores
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convert_hf_checkpoint import convert
from formats.config import Config
from formats.weights import FORMAT
from model import Llama, load_model, rope_table
from ops.linear import linear
from tokenizer import Tokenizer

LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 128, "rope_theta": 10000.0}
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-3,
         "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama mha": ("Llama", {"num_key_value_heads": 4}),
    "llama mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama head_dim": ("Llama", {"head_dim": 24}),
    "llama 3.1": ("Llama", {"rope_parameters": LLAMA31}),
    "llama theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 400}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen3 tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def oracle(family: str) -> nn.Module:
    """A transformers model with random weights: sharp attention, and no norm or bias at its neutral value."""
    name, changes = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SMALL | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    tiny.randomise(model, seed=len(family), dtype=torch.float32)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def native(model: nn.Module, folder: Path, **how) -> Llama:
    """The same model saved by transformers, converted, loaded."""
    model.save_pretrained(folder / "hf", **how)
    convert(folder / "hf", folder / "native", torch.float32)
    return load_model(folder / "native")


@torch.inference_mode()
def assert_same_logits(ours: Llama, theirs: nn.Module, ids: Tensor) -> None:
    ours.allocate_cache(ids.shape[1])
    logits, expected = ours.lm_head(ours(ids, torch.arange(ids.shape[1]))), theirs(ids).logits
    assert expected.std() > 0.5  # else the comparison would show little
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def ids(length: int, batch: int = 2, vocab: int = 100) -> Tensor:
    return torch.tensor([tiny.prompt(seed, length, vocab) for seed in range(batch)])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    """Fails if rows are fused in the wrong order, if RoPE has the other layout, or if a norm, bias, epsilon or scaling
    is forgotten."""
    theirs = oracle(family)
    assert_same_logits(native(theirs, tmp_path), theirs, ids(300))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_sharded_folder(family: str, tmp_path: Path) -> None:
    """Fails if a tensor is lost, or taken from the wrong file, where a model comes in several."""
    theirs = oracle(family)
    ours = native(theirs, tmp_path, max_shard_size="100KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert_same_logits(ours, theirs, ids(50))


def test_comparison_is_sharp(tmp_path: Path) -> None:
    """Fails if the test models are so smooth that they agree with transformers whatever is wrong: each change here must
    show."""
    theirs = oracle("llama 3.1")
    native(theirs, tmp_path)
    raw = json.loads((tmp_path / "native/config.json").read_text())
    rope = raw["rope_parameters"]
    for change in ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {"rms_norm_eps": 1e-2},
                   {"rope_parameters": rope | {"rope_theta": 11000.0}}, {"rope_parameters": rope | {"factor": 7.5}},
                   {"rope_parameters": rope | {"low_freq_factor": 1.2}},
                   {"rope_parameters": rope | {"high_freq_factor": 3.8}}):
        (tmp_path / "native/config.json").write_text(json.dumps(raw | change))
        with pytest.raises(AssertionError):
            assert_same_logits(load_model(tmp_path / "native"), theirs, ids(300))


def test_old_and_new_config(tmp_path: Path) -> None:
    """Fails if rope_theta and rope_scaling are read from one of their two places only: transformers 5 moved them."""
    theirs = oracle("llama 3.1")
    ours = native(theirs, tmp_path)
    path = tmp_path / "native/config.json"
    raw = json.loads(path.read_text())
    assert "rope_parameters" in raw
    rope = raw.pop("rope_parameters")
    for old in ({"rope_type": "llama3"}, {"type": "llama3"}):
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")} | old
        path.write_text(json.dumps(raw | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}))
        assert Config.load(path) == ours.cfg
    plain = {k: v for k, v in tiny.SHAPE.items()}
    assert Config.from_dict(plain | {"rope_theta": 7.0}).rope_theta == 7.0
    assert Config.from_dict(plain | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}).rope_theta == 7.0
    assert Config.from_dict(plain | {"rope_scaling": None}).rope_theta == 10000.0


@pytest.mark.parametrize("family", ["llama 3.1", "qwen3", "qwen2"])
@torch.inference_mode()
def test_cached_in_pieces(family: str, tmp_path: Path) -> None:
    """Fails if keys are rotated by the slot instead of the position, if a mask is off by one, or if siblings overwrite
    each other."""
    model = native(oracle(family), tmp_path).double()
    text = tiny.prompt(9, 40, 100)
    model.allocate_cache(64, spare=8)
    whole = tiny.features(model, text)
    parts, start = [], 0
    for size in (17, 1, 7, 1, 1, 9):  # 36 tokens through the cache
        slots = torch.arange(start, start + size)
        mask = torch.arange(start + size) <= slots[:, None]
        parts.append(model(torch.tensor([text[start:start + size]]), slots, slots, mask)[0])
        start += size
    assert torch.allclose(torch.cat(parts), whole[:start], atol=1e-9)
    # Then a tree: two branches of text[36], one going on as the text does. Slots in an order of their own.
    tokens, place, parents = [*text[36:38], 5, text[38], 6, text[39]], [36, 37, 37, 38, 38, 39], [None, 0, 0, 1, 2, 3]
    slots = [40, 36, 43, 39, 37, 41]
    mask = torch.zeros(6, 64, dtype=torch.bool)
    mask[:, :36] = True
    paths = []
    for row, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent is not None else []), row])
        mask[row, [slots[i] for i in paths[row]]] = True
    got = model(torch.tensor([tokens]), torch.tensor(place), torch.tensor(slots), mask)[0]
    for row, path in enumerate(paths):
        expected = tiny.features(model, text[:36] + [tokens[i] for i in path])[-1]
        assert torch.allclose(got[row], expected, atol=1e-9), row
    additive = torch.zeros(6, 64, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    assert torch.allclose(model(torch.tensor([tokens]), torch.tensor(place), torch.tensor(slots), additive)[0], got)


def test_batch_in_cache() -> None:
    """Fails if sequences of a batch share keys (training generates its dialogues in batches)."""
    model = tiny.target()
    rows = torch.tensor([tiny.prompt(seed, 20) for seed in range(3)])
    model.allocate_cache(32, batch=3)
    slots = torch.arange(20)
    cached = model(rows, slots, slots, slots <= slots[:, None])
    for row, got in zip(rows.tolist(), cached, strict=True):
        assert torch.allclose(tiny.features(model, row), got, atol=1e-9)


def test_rope_table_far_out() -> None:
    """Fails if angles are made of half-precision positions: beyond 2048, neighbours would share an angle."""
    cfg = Config.from_dict(tiny.SHAPE | {"head_dim": 64})
    cos, sin = rope_table(cfg, 9000)
    angle = 8191 / 10000 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert torch.allclose(cos[8191, :32].double(), angle.cos(), atol=2e-3)
    assert torch.allclose(sin[8191, 32:].double(), angle.sin(), atol=2e-3)


# ----- Refusals --------------------------------------------------------------------------------------------------

REFUSED = {
    "model_type 'gpt2'": {"model_type": "gpt2"},
    "model_type 'mixtral'": {"model_type": "mixtral", "num_local_experts": 8},
    "mixture of experts": {"model_type": "qwen3", "num_experts": 8},
    "RoPE type 'proportional'": {"rope_parameters": {"rope_type": "proportional", "rope_theta": 10000.0}},
    "short_factor should be a list of 4": {"rope_parameters": {"rope_type": "longrope"}},
    "'yarn' does not use": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "low_freq_factor": 1.5}},
    "beta_slow 64": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_slow": 64}},
    "rope_theta should be more than 1": {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "original_max_position_embeddings should be more than 1": {"rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1}},
    "biases in the MLP": {"mlp_bias": True},
    "attention output": {"attention_bias": True},
    "hidden_act 'gelu'": {"hidden_act": "gelu"},
    "quantization_config": {"quantization_config": {"quant_method": "exl2"}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "hidden_size": {"hidden_size": -8},
    "num_hidden_layers": {"num_hidden_layers": "two"},
    "do not fit together": {"num_key_value_heads": 3},
    "vocab_size": {"vocab_size": None},
    "factor": {"rope_scaling": {"rope_type": "llama3"}},
    "low_freq_factor should be below": {"rope_parameters": LLAMA31 | {"low_freq_factor": 4.0}},
}
# Keys whose numbers must be positive. With a wrong one a model would load, and then write nonsense or NaN.
NUMBERS = [
    ("rope_theta", {}), ("rms_norm_eps", {}), ("sliding_window", {"model_type": "mistral"}),
    *((key, {"rope_parameters": LLAMA31}) for key in LLAMA31 if key != "rope_type"),
]
NOT_POSITIVE = [math.nan, math.inf, -math.inf, -1.0, 0, 0.0, "10000", True, [1.0], 10**400]


@pytest.mark.parametrize("message", REFUSED)
def test_refused_by_name(message: str, tmp_path: Path) -> None:
    """Fails if an architecture that is not implemented runs approximately, or if the error does not say what is
    missing."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.SHAPE | REFUSED[message]))
    with pytest.raises(ValueError) as error:
        Config.load(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, beside", NUMBERS)
def test_numbers_refused(key: str, beside: dict, tmp_path: Path) -> None:
    """Fails if a zero is taken for a missing value, if a scaling of 0 divides, if text is converted to a number, or if
    the error comes late."""
    def config(value: object) -> dict:
        inner = {name: scaling | {key: value} for name, scaling in beside.items() if isinstance(scaling, dict)}
        return tiny.SHAPE | beside | (inner or {key: value})

    for value in [*NOT_POSITIVE, 64.5] if key == "sliding_window" else NOT_POSITIVE:
        (tmp_path / "config.json").write_text(json.dumps(config(value)))
        with pytest.raises(ValueError, match=f"config.json: {key} should be a positive .*number, not ") as error:
            Config.load(tmp_path)
        assert "\n" not in str(error.value)
    Config.from_dict(config(3))  # a whole number is a number


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"', "[" * 100000, '{"model_type": "llama"}',
                                  '{"model_type": "llama", "rope_scaling": "linear"}'])
def test_broken_config(text: str, tmp_path: Path) -> None:
    """Fails if a config.json that is empty, cut off or of the wrong kind ends in a traceback."""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json"):
        Config.load(tmp_path)


def test_sliding_window() -> None:
    """Fails if a window is silently ignored beyond its length, or refused where it makes no difference."""
    mistral = Config.from_dict(tiny.SHAPE | {"model_type": "mistral", "sliding_window": 64})
    Llama(mistral).allocate_cache(64, spare=16)
    with pytest.raises(ValueError, match="sliding window of 64"):
        Llama(mistral).allocate_cache(65)
    for unused in ({"model_type": "mistral", "sliding_window": None}, {"model_type": "qwen2", "sliding_window": 64},
                   {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 64}):
        Llama(Config.from_dict(tiny.SHAPE | unused)).allocate_cache(500)
    for used in ({"use_sliding_window": True, "max_window_layers": 1},
                 {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(ValueError, match="sliding window"):
            model = Llama(Config.from_dict(tiny.SHAPE | {"model_type": "qwen2", "sliding_window": 64} | used))
            model.allocate_cache(500)


# ----- Damaged checkpoints ---------------------------------------------------------------------------------------


def break_file(folder: Path, how: str) -> None:
    """Break a checkpoint in the way that `how` names."""
    file, config = folder / "model.safetensors", folder / "config.json"
    data, tensors = file.read_bytes(), load_file(file)
    rewrite = {
        "another shape": tensors | {"layers.1.w2.weight": torch.zeros(32, 47)},
        "a tensor less": {name: t for name, t in tensors.items() if name != "layers.1.w2.weight"},
        "a tensor more": tensors | {"layers.2.w2.weight": torch.zeros(32, 48)},
        "not converted": {"model.embed_tokens.weight": torch.zeros(24, 32)},
    }
    if how in rewrite:
        save_file(rewrite[how], file, None if how == "not converted" else {"format": FORMAT})
    elif how == "no config":
        config.unlink()
    elif how == "no weights":
        file.unlink()
    elif how == "config of another model":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 25}))
    else:
        file.write_bytes({"truncated": data[:-100], "half a header": data[:50], "empty": b"",
                          "random bytes": bytes(range(256)) * 40, "huge header": b"\xff" * 7 + b"\x00" + data,
                          "json, wrong": (9).to_bytes(8, "little") + b"[1, 2, 3]"}[how])


@pytest.mark.parametrize("how", [
    "truncated", "half a header", "empty", "random bytes", "huge header", "json, wrong", "another shape",
    "a tensor less", "a tensor more", "not converted", "no config", "no weights", "config of another model"])
def test_broken_checkpoint(how: str, tmp_path: Path) -> None:
    """Fails if a broken download ends in a traceback, in several lines, or in a line that does not name the file."""
    folder = tiny.save_target(tiny.target(), tmp_path)
    load_model(folder)
    break_file(folder, how)
    with pytest.raises((ValueError, OSError)) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_load_keeps_or_changes_dtype(tmp_path: Path) -> None:
    """Fails if a tied lm_head becomes a second copy, if a file cannot be named instead of its folder, or if a dtype is
    ignored."""
    model = tiny.target(tie_word_embeddings=True)
    folder = tiny.save_target(model, tmp_path)
    text = tiny.prompt(0, 12)
    for path in (folder, folder / "model.safetensors"):
        loaded = load_model(path)
        assert loaded.embed.weight.dtype == torch.float64
        assert torch.equal(tiny.logits(loaded, text), tiny.logits(model, text))
        loaded = load_model(path, dtype=torch.float32)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert loaded.lm_head.weight.data_ptr() == loaded.embed.weight.data_ptr()


# ----- The demo model --------------------------------------------------------------------------------------------


def unfused(model: Llama) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names."""
    cfg, ours = model.cfg, model.state_dict()
    names = {"embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head", "attn_norm": "input_layernorm",
             "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "w2": "mlp.down_proj"}
    heads = [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
    split = {"wqkv": ([f"self_attn.{x}_proj" for x in "qkv"], heads),
             "w13": (["mlp.gate_proj", "mlp.up_proj"], [cfg.intermediate_size] * 2)}
    state = {}
    for name, weight in ours.items():
        *prefix, module, kind = name.split(".")
        place = "model.layers." + prefix[1] + "." if prefix else ""
        parts, rows = split.get(module, ([names.get(module)], [len(weight)]))
        state |= {f"{place}{part}.{kind}": t for part, t in zip(parts, weight.split(rows), strict=True)}
    return state


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 64, 65])
def test_few_rows_of_fp32(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the product that a CPU uses for a few rows of fp32 mixes up rows and columns, loses the bias, or returns
    rows that are not contiguous, which the next product would read slowly."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    random = torch.Generator().manual_seed(rows)
    weight, bias, x = (torch.randn(shape, generator=random) for shape in ((24, 40), (24,), (1, rows, 40)))
    for given in (x, x[0], x[0].T.contiguous().T):
        for b in (bias, None):
            y = linear(given, weight, b)
            wanted = given.double() @ weight.double().T + (0 if b is None else b.double())
            torch.testing.assert_close(y, wanted.float())
            assert y.is_contiguous()


@pytest.mark.slow
@torch.inference_mode()
def test_demo_logits_equal_transformers(demo: Path, demo_model: Llama) -> None:
    """Fails if conversion or model are right for tiny random weights only, and wrong for trained ones of real size."""
    raw = json.loads((demo / "config.json").read_text())
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw, dtype="float32")).eval()
    theirs.load_state_dict(unfused(demo_model))
    with all_cores():
        assert_same_logits(demo_model, theirs, ids(64, 1, 49152))


@pytest.mark.slow
@torch.inference_mode()
def test_demo_reads_english(demo: Path, demo_model: Llama) -> None:
    """Fails if rows of q and k are left in GGUF's order: the comparison above undoes our own conversion, and would not
    notice."""
    text = ("The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is Rome. "
            "The capital of Spain is")
    tokenizer = Tokenizer(demo)
    ids = tokenizer.encode(text)
    with all_cores():
        logits = tiny.logits(demo_model, ids)
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Madrid"
    assert nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])) < 1.7  # 1.2 is right, 2.4 with wrong rows


def gguf_weights(path: Path) -> dict[str, Tensor]:
    """The dequantised tensors of a GGUF file of the Llama family under Hugging Face's names. llama.cpp rotates
    neighbouring rows of a head, Hugging Face rows half a head apart."""
    reader = gguf.GGUFReader(path)
    heads = {x: reader.fields[f"llama.attention.head_count{tail}"].contents() for x, tail in (("q", ""), ("k", "_kv"))}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    wanted = ["model.embed_tokens", "model.norm"] + [f"model.layers.{i}.{part}" for i in range(30) for part in (
        "input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo"),
        *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))]
    tensors = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    state = {}
    for name in wanted:
        weight = tensors[names.get_name(name) + ".weight"]
        for x in "qk":
            if f"self_attn.{x}_proj" in name:
                size = len(weight) // heads[x]
                weight = weight[[h * size + 2 * (i % (size // 2)) + i // (size // 2)
                                 for h in range(heads[x]) for i in range(size)]]
        state[name + ".weight"] = weight
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


@pytest.mark.slow
@torch.inference_mode()
def test_demo_from_gguf(tmp_path: Path) -> None:
    """Fails if blocks are dequantised wrongly, or rows of q and k reordered wrongly, compared with the file itself."""
    path = Path(os.environ.get("DEMO_GGUF", ""))
    if not path.is_file():
        pytest.skip("DEMO_GGUF names no file: set it to the SmolLM2-135M-Instruct GGUF")
    with all_cores():
        convert(path, tmp_path / "native", torch.float32)
        raw = json.loads((tmp_path / "native/config.json").read_text()) | {"dtype": "float32"}
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).eval()
        theirs.load_state_dict(gguf_weights(path))
        assert_same_logits(load_model(tmp_path / "native"), theirs, ids(64, 1, 49152))
