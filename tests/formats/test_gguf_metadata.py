"""What the metadata of a GGUF file says, as llama.cpp takes it: a model is the plain one, or is computed as it asks, or
is refused by name. And files that are no whole GGUF file.

    python -m pytest tests/formats/test_gguf_metadata.py
"""
import math
import time
from collections.abc import Iterable
from pathlib import Path

import gguf
import pytest
import tiny
import torch
import transformers
from published import assert_nothing_loads, run
from tokenizers import pre_tokenizers
from torch import Tensor

from convert_hf_checkpoint import convert
from formats.gguf_tokenizer import write_gguf_tokenizer
from model import load_model
from tokenizer import Tokenizer

torch.set_num_threads(1)
HIDDEN, INTERMEDIATE, LAYERS, HEADS, CONTEXT = 32, 48, 2, 4, 4096
TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["12", "<start>", "<stop>", "<x>", "<y>"]
BOS, EOS, X, Y = range(257, 261)
IDS = torch.randint(0, len(TOKENS), (64,), generator=torch.Generator().manual_seed(0)).tolist()
BASE = {"block_count": LAYERS, "context_length": CONTEXT, "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE, "attention.head_count": HEADS, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5}
TOKENIZER = {"model": "gpt2", "pre": "smollm", "tokens": TOKENS, "token_type": [1] * 257 + [3, 3, 3, 4],
             "merges": ["1 2"], "bos_token_id": BOS, "eos_token_id": EOS}
MODULES = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
           "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
           "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
           "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Write a field with the type that llama.cpp's converter would give it."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    kinds[type(value)](key, value)


def shapes_of(arch: str, fields: dict, biases: bool) -> dict[str, tuple[int, ...]]:
    """GGUF's names of all tensors, and their shapes. A plain file has 2 key/value heads, and 4 where no field says."""
    size = fields.get("attention.key_length", HIDDEN // HEADS)
    q = HEADS * size
    kv = (HEADS if fields.get("attention.head_count_kv") is None else 2) * size
    layer = {"attn_norm.weight": (HIDDEN,), "attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN),
             "attn_v.weight": (kv, HIDDEN), "attn_output.weight": (HIDDEN, q), "ffn_norm.weight": (HIDDEN,),
             "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "ffn_up.weight": (INTERMEDIATE, HIDDEN),
             "ffn_down.weight": (HIDDEN, INTERMEDIATE)}
    if biases or arch == "qwen2":
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if arch == "qwen3":
        layer |= {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)}
    shapes = {"token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,),
              "output.weight": (len(TOKENS), HIDDEN)}
    return shapes | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def hf_name(name: str) -> str:
    top = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
           "output.weight": "lm_head.weight"}
    if name in top:
        return top[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def write(path: Path, arch: str = "llama", *, fields: dict | None = None, tensors: dict[str, Tensor] | None = None,
          tokenizer: dict | None = None, others: dict | None = None, biases: bool = False, without: str = "",
          endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> dict[str, Tensor]:
    """Write a small GGUF file: the plain one with changes, of which None takes a field out. Returns its weights in
    Hugging Face's names and order of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = BASE | (fields or {})
    writer = gguf.GGUFWriter(path, arch, endianess=endian)
    named = {f"{arch}.{key}": value for key, value in fields.items()}
    named |= {f"tokenizer.ggml.{key}": value for key, value in (TOKENIZER | (tokenizer or {})).items()}
    for key, value in (named | (others or {})).items():
        if value is not None:
            add(writer, key, value)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes_of(arch, fields, biases).items():
        weight = torch.randn(shape, generator=generator) * (0.4 if len(shape) > 1 else 1)
        if name == without:
            continue
        weights[hf_name(name)] = weight
        if arch == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):  # llama.cpp's order: (half, j) -> (j, half)
            size = fields.get("attention.key_length", HIDDEN // HEADS)
            weight = weight.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).reshape(shape)
        writer.add_tensor(name, weight.contiguous().numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def our_logits(path: Path) -> Tensor:
    convert(path, path.with_suffix(".out"), torch.float32)
    return tiny.logits(load_model(path.with_suffix(".out"), dtype=torch.float32), IDS)


@torch.inference_mode()
def their_logits(arch: str, weights: dict[str, Tensor], **changes: object) -> Tensor:
    """The logits of transformers' model of these weights, with changes to its config."""
    base = {"vocab_size": len(TOKENS), "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "head_dim": 8,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2, "rope_theta": 1e4,
            "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT, "pad_token_id": None, "bos_token_id": None,
            "tie_word_embeddings": "lm_head.weight" not in weights}
    kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    model = transformers.AutoModelForCausalLM.from_config(kind[arch](**base | changes), dtype=torch.float32).eval()
    missing = model.load_state_dict(weights, strict=False).missing_keys
    if changes.get("attention_bias"):  # for transformers it includes one of o_proj, which the file does not have
        missing = [name for name in missing if not name.endswith("o_proj.bias")]
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    assert set(missing) <= {"lm_head.weight"}
    return model(torch.tensor([IDS])).logits[0]


# ----- Fields of the architecture ------------------------------------------------------------------------------------

# Fields that leave the model as it is.
NEUTRAL = [
    {"rope.scale_linear": 1.0}, {"rope.scale_linear": 0.0}, {"rope.scaling.factor": 1.0}, {"rope.scaling.factor": 0.0},
    {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope.scaling.type": "none", "rope.scale_linear": 4.0},
    {"rope.scaling.type": "linear"}, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    {"rope.scaling.factor": 1.0, "rope.scale_linear": 4.0},  # the second is the old name, read where the first is not
    {"rope.scaling.attn_factor": 1.0}, {"rope.scaling.finetuned": True}, {"rope.scaling.yarn_ext_factor": 0.0},
    {"rope.scaling.original_context_length": 2048}, {"rope.freq_base": 10000.0}, {"rope.dimension_count": 8},
    {"rope.dimension_sections": [0, 0, 0, 0]}, {"attention.key_length": 8, "attention.value_length": 8},
    {"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [48, 48]},
    {"attention.scale": 0.0}, {"attention.scale": 8 ** -0.5}, {"attention.causal": True},
    {"attention.sliding_window": 0}, {"attention.sliding_window": CONTEXT}, {"attention.clamp_kqv": 0.0},
    {"attention.sliding_window_pattern": [False, False]}, {"attn_logit_softcapping": 0.0},
    {"final_logit_softcapping": 0.0}, {"embedding_scale": 1.0}, {"residual_scale": 1.0}, {"logit_scale": 1.0},
    {"logit_scale": 0.0}, {"expert_count": 0, "expert_used_count": 0}, {"use_parallel_residual": False},
    {"vocab_size": len(TOKENS)}, {"tensor_data_layout": "Meta AI original pth"}, {"pooling_type": 3},
    {"some_multiplier": 1.0}]

# Fields that change the model.
REFUSED = [
    {"rope.scaling.factor": math.nan}, {"rope.scaling.factor": -2.0},
    {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.8},
    {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
    {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 0.0},
    {"rope.scaling.type": "longrope"}, {"rope.scaling.type": "anything"}, {"rope.scaling.attn_factor": 0.8},
    {"rope.scaling.attn_factor": 0.0}, {"rope.scaling.yarn_ext_factor": 1.0}, {"rope.scaling.yarn_attn_factor": 0.5},
    {"rope.scaling.alpha": 1.0},
    {"rope.dimension_count": 4}, {"rope.dimension_sections": [1, 1, 2, 0]}, {"rope.freq_base_swa": 500.0},
    {"rope.freq_base": 0.0}, {"rope.new_thing": 3}, {"attention.value_length": 4},
    {"attention.key_length": 8, "attention.value_length": 16},
    {"attention.head_count": [4, 2]}, {"attention.head_count_kv": [2, 1]}, {"feed_forward_length": [48, 32]},
    {"attention.head_count_kv": [2, 0]}, {"attention.scale": 0.5}, {"attention.scale": "no number"},
    {"attention.causal": False},
    {"attention.sliding_window": 1024}, {"attention.sliding_window_pattern": [True, False]},
    {"attention.sliding_window_pattern": 4}, {"attention.clamp_kqv": 8.0}, {"attention.max_alibi_bias": 8.0},
    {"attention.temperature_scale": 0.1}, {"attention.output_scale": 0.2}, {"attention.kv_lora_rank": 512},
    {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": 1.0}, {"final_logit_softcapping": 30.0},
    {"embedding_scale": 12.0}, {"residual_scale": 0.22}, {"logit_scale": 0.125}, {"logit_scale": 8.0},
    {"router_logit_softcapping": 30.0}, {"expert_count": 8, "expert_used_count": 2}, {"expert_used_count": 2},
    {"expert_weights_scale": 2.5}, {"use_parallel_residual": True}, {"swin_norm": True}, {"nextn_predict_layers": 1},
    {"rescale_every_n_layers": 1}, {"some_multiplier": 2.0}, {"some_window": 512}, {"some_scale": [0.5, 0.7]},
    {"hidden_act": "gelu"}, {"context_length": None}, {"embedding_length": None},
    {"attention.layer_norm_rms_epsilon": None}, {"attention.head_count": None}, {"block_count": None},
    {"feed_forward_length": None}, {"attention.head_count": 0},
    {"context_length": "many"}]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_fields_that_change_nothing(arch: str, tmp_path: Path) -> None:
    """Fails if a neutral value is refused, as converters write many of them, or another model comes out."""
    made = []
    for i, fields in enumerate([{}, *(NEUTRAL if arch == "llama" else NEUTRAL[::5])]):
        write(tmp_path / f"{i}.gguf", arch, fields=fields)
        convert(tmp_path / f"{i}.gguf", tmp_path / "out", name="any")
        made.append([(tmp_path / "out" / name).read_bytes() for name in ("config.json", "model.safetensors")])
        assert made[i] == made[0], fields


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_fields_that_change_the_model_are_refused(arch: str, tmp_path: Path) -> None:
    """Fails if a field that llama.cpp computes with, here or in another architecture, is passed over: the model would
    load and answer wrongly. Fails too if the error does not name the field."""
    for i, fields in enumerate(REFUSED if arch == "llama" else REFUSED[::5]):
        write(tmp_path / f"{i}.gguf", arch, fields=fields)
        with pytest.raises(ValueError) as refused:
            convert(tmp_path / f"{i}.gguf", tmp_path / "out")
        assert any(f"{arch}.{key}" in str(refused.value) for key in fields), (fields, refused.value)
        assert f"{i}.gguf" in str(refused.value) and ".part" not in str(refused.value)
        assert "\n" not in str(refused.value)
    assert_nothing_loads(tmp_path / "out")


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
MORE_YARN = {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 0.5, "rope.scaling.attn_factor": 0.5,
             "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.1}
THEIR_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


def llama3_divisors(factor: float) -> tuple[Tensor, dict]:
    """What Llama 3.1 divides the frequencies of 8 elements by, and transformers' words for it."""
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    frequencies = 500000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    smooth = ((8192 * frequencies / (2 * math.pi) - 1) / 3).clamp(0, 1)
    return (1 / (smooth + (1 - smooth) / factor)).float(), rope


@pytest.mark.slow
def test_fields_that_are_computed_with(tmp_path: Path) -> None:
    """Fails if a model is not transformers' one of the same meaning: RoPE's base and Llama 3's divisors, sizes of
    heads, a default where a field is missing, epsilon, biases of a Llama, tied weights."""
    divisors, llama3 = llama3_divisors(8.0)
    freqs = {"tensors": {"rope_freqs.weight": divisors}, "fields": {"rope.freq_base": 500000.0}}
    all_heads = {"fields": {"attention.head_count_kv": None}}
    wide = {"attention.key_length": 16, "attention.value_length": 16, "rope.dimension_count": 16}
    cases = [
        *((arch, {}, {}) for arch in ("llama", "qwen2", "qwen3")),
        *((arch, {"fields": {"rope.freq_base": 100.0}}, {"rope_theta": 100.0}) for arch in ("llama", "qwen2", "qwen3")),
        *((arch, all_heads, {"num_key_value_heads": 4}) for arch in ("llama", "qwen3")),
        *((arch, {"fields": wide}, {"head_dim": 16}) for arch in ("llama", "qwen3")),
        ("llama", {"fields": {"attention.layer_norm_rms_epsilon": 0.1}}, {"rms_norm_eps": 0.1}),
        ("llama", {"biases": True}, {"attention_bias": True}), ("qwen3", {"biases": True}, {"attention_bias": True}),
        ("llama", {"without": "output.weight"}, {}),
        *((arch, {"fields": fields}, {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}})
          for arch, fields in (("llama", {"rope.scale_linear": 4.0}), ("qwen2", {"rope.scaling.factor": 4.0}),
                               ("llama", {"rope.scaling.type": "linear", "rope.scale_linear": 4.0}),
                               ("llama", {"rope.scaling.factor": 4.0, "rope.scale_linear": 1.0}))),
        ("qwen3", {"fields": YARN}, {"rope_parameters": THEIR_YARN}),
        ("llama", {"fields": YARN | MORE_YARN}, {"rope_parameters": THEIR_YARN | {
            "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}}),
        ("llama", freqs, {"rope_parameters": llama3}),
        ("llama", {"tensors": {"rope_freqs.weight": torch.ones(4)}}, {}),
        ("qwen3", {"fields": {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}}, {})]
    plain = {}
    for i, (arch, ours, theirs) in enumerate(cases):
        path = tmp_path / f"{i}.gguf"
        weights = write(path, arch, **ours)
        logits = our_logits(path)
        expected = their_logits(arch, weights, **theirs)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4, msg=f"{arch} {ours}")
        other = plain.setdefault(arch, logits)
        assert not theirs or not torch.allclose(logits, other, atol=0.01), "the field would not be seen"
        oracle = transformers.AutoConfig.from_pretrained(path.with_suffix(".out"))  # other programs read it too
        assert oracle.model_type == ("qwen2" if arch == "llama" and "biases" in ours else arch)


@pytest.mark.slow
def test_tensors_that_change_the_model_are_refused(tmp_path: Path) -> None:
    """Fails if divisors of another scaling, of another length, or beside a second scaling are taken for Llama 3's, or a
    tensor is left out."""
    divisors, _ = llama3_divisors(8.0)
    freqs = "rope_freqs.weight"
    cases = [  # name, tensor, field, what the error names
        (freqs, divisors, {"rope.freq_base": 10000.0}, freqs), (freqs, 1.001 * divisors, {}, freqs),
        (freqs, divisors[:3], {}, freqs),
        (freqs, divisors.repeat(2), {}, freqs), (freqs, torch.zeros(4), {}, freqs),
        (freqs, torch.full((4,), math.nan), {}, freqs),
        (freqs, divisors, {"rope.scaling.factor": 2.0}, "llama.rope.scaling.factor"),
        (freqs, divisors, {"rope.scaling.type": "yarn"}, "yarn"),
        ("rope_factors_long.weight", divisors, {}, "rope_factors_long.weight"),
        ("rope_factors_short.weight", divisors, {"rope.scaling.type": "longrope"}, "rope.scaling.type = longrope"),
        ("blk.0.attn_q.scale", torch.ones(1), {}, "blk.0.attn_q.scale"),
        ("blk.0.attn_q.input_scale", torch.ones(1), {}, "blk.0.attn_q.input_scale"),
        ("blk.0.attn_sinks.weight", torch.ones(4), {}, "blk.0.attn_sinks.weight"),
        ("blk.0.ffn_gate_exps.weight", torch.ones(2, 2), {}, "blk.0.ffn_gate_exps.weight"),
        ("blk.0.attn_q_norm.weight", torch.ones(8), {}, "layers.0.self_attn.q_norm.weight"),
        ("blk.0.attn_output.bias", torch.ones(HIDDEN), {}, "layers.0.self_attn.o_proj.bias"),
        ("blk.0.attn_q.bias", torch.ones(HIDDEN), {}, "k_proj.bias"),
        ("output.bias", torch.ones(len(TOKENS)), {}, "lm_head.bias"),
        ("blk.2.attn_q.weight", torch.ones(HIDDEN, HIDDEN), {}, "layers.2.self_attn.q_proj.weight")]
    for i, (name, tensor, fields, words) in enumerate(cases):
        path = tmp_path / f"{i}.gguf"
        write(path, fields={"rope.freq_base": 500000.0} | fields, tensors={name: tensor})
        with pytest.raises(ValueError) as refused:
            convert(path, tmp_path / "out")
        assert words in str(refused.value), (name, refused.value)


# ----- Where an answer ends ------------------------------------------------------------------------------------------


def stops(path: Path, *, tokenizer: dict, **options: object) -> frozenset[int]:
    write(path, tokenizer=tokenizer, **options)
    convert(path, path.with_suffix(".out"))
    return Tokenizer(path.with_suffix(".out")).stop_ids


def named(names: Iterable[str], kind: int = 3) -> dict:
    """The plain tokenizer with these tokens in place of the last ones."""
    names = list(names)
    types = [1] * 257 + [3] * (4 - len(names)) + [kind] * len(names)
    return {"tokens": TOKENS[:-len(names)] + names, "token_type": types}


@pytest.mark.slow
def test_stop_ids(tmp_path: Path) -> None:
    """Fails if a model from GGUF runs on where llama.cpp, and the Hugging Face folder with its list of ids, stop: at a
    special token that is named as an end. Fails too if plain text of such a name stops it."""
    names = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>",
             "<EOT>", "</s>", "<|fim_pad|>", "<|file_sep|>")
    for i, name in enumerate(names):
        assert stops(tmp_path / f"{i}.gguf", tokenizer=named([name])) == {EOS, Y}, name
        assert stops(tmp_path / f"{i}user.gguf", tokenizer=named([name], 4)) == {EOS, Y}, name
        assert stops(tmp_path / f"{i}text.gguf", tokenizer=named([name], 1)) == {EOS}, name
    for i, name in enumerate(("<|im_start|>", "<|fim_prefix|>", "<|endoftext", "<|END|>", "<tool>")):
        assert stops(tmp_path / f"{i}other.gguf", tokenizer=named([name])) == {EOS}, name
    both = named(["<|im_end|>", "<|endoftext|>"]) | {"eos_token_id": X}
    assert stops(tmp_path / "qwen.gguf", tokenizer=both) == {X, Y}
    fields = {"eot_token_id": X, "eom_token_id": Y}
    assert stops(tmp_path / "fields.gguf", tokenizer=fields) == {EOS, X, Y}
    assert stops(tmp_path / "list.gguf", tokenizer={"eos_token_ids": [EOS, Y]}) == {EOS, Y}
    assert stops(tmp_path / "none.gguf", tokenizer={"eot_token_id": 2**32 - 1}) == {EOS}  # llama.cpp's "no such token"


def test_missing_ids_of_the_tokenizer(tmp_path: Path) -> None:
    """Fails if a field that llama.cpp does without is asked for, or one that it needs is invented."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["▁", "▁▁"]
    spm = {"model": "llama", "pre": None, "merges": None, "tokens": pieces, "scores": [-float(i) for i in range(261)],
           "token_type": [2, 3, 3] + [6] * 256 + [1, 1], "bos_token_id": None, "eos_token_id": None}
    assert stops(tmp_path / "spm.gguf", tokenizer=spm) == {2}
    assert Tokenizer(tmp_path / "spm.out").encode("") == [1]
    assert stops(tmp_path / "eos.gguf", tokenizer=spm | {"add_eos_token": True}) == {2}
    assert Tokenizer(tmp_path / "eos.out").encode("") == [1, 2]
    for key, changes in (("eos_token_id", {}), ("eos_token_id", {"eos_token_id": 2**32 - 1}), ("merges", {}),
                         ("token_type", {}), ("tokens", {}), ("bos_token_id", {"add_bos_token": True})):
        write(tmp_path / "a.gguf", tokenizer={key: None} | changes)
        with pytest.raises(ValueError, match=rf"tokenizer\.ggml\.{key}"):
            convert(tmp_path / "a.gguf", tmp_path / "out")


# ----- Files ---------------------------------------------------------------------------------------------------------


def assert_each_is_named(cases: dict[str, bytes], path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture) -> None:
    """Converting each of these files must end in one line that names the file and has these words."""
    for words, data in cases.items():
        path.write_bytes(data)
        assert run(monkeypatch, path, "--out", path.parent / "out") == 2, words
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}") and words in error and error.count("\n") == 1, (words, error)
    assert_nothing_loads(path.parent / "out")


def test_files_that_are_no_gguf_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Fails if such a file is converted, or the error does not say what it is."""
    path = tmp_path / "a.GGUF"
    write(path)
    whole = path.read_bytes()
    write(tmp_path / "big.gguf", endian=gguf.GGUFEndian.BIG)
    cases = {
        "empty": b"", "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 98362432\n",
        "web page": b"\xef\xbb\xbf\r\n <!DOCTYPE HTML><html><body>Log in</body></html>" + bytes(9999),
        "no GGUF": b'{"error":"Repository not found"}', "older than GGUF": b"tjgg" + bytes(99),
        "version is 1": whole[:4] + b"\1\0\0\0" + whole[8:], "version is 4": whole[:4] + b"\4\0\0\0" + whole[8:],
        "big-endian": (tmp_path / "big.gguf").read_bytes(),
        "damaged": whole.replace(b"llama.block", b"llama.\xff\xff\xff\xff\xff"),
        "architecture None": whole.replace(b"general.architecture", b"general.ARCHITECTURE"),
    }
    write(path, without="token_embd.weight")
    cases["token_embd.weight"] = path.read_bytes()
    write(path, "clip")
    cases["architecture 'clip'"] = path.read_bytes()
    others = {"3 files": {"split.count": 3, "split.no": 0}, "adapter": {"general.type": "adapter"},
              "mmproj": {"general.type": "mmproj"}}
    for words, fields in others.items():
        write(path, others=fields)
        cases[words] = path.read_bytes()
    assert_each_is_named(cases, path, monkeypatch, capsys)


@pytest.mark.slow
def test_cut_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Fails if half a download is converted, or its error is not the one line that says so, wherever it ends."""
    path = tmp_path / "a.gguf"
    write(path)
    whole = path.read_bytes()
    for size in (4, 8, 23, 24, 60, *range(100, len(whole) - 64, len(whole) // 30), len(whole) - 64):
        assert_each_is_named({"cut off": whole[:size]}, path, monkeypatch, capsys)


@pytest.mark.slow
def test_a_damaged_length_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Fails if gguf reads as many numbers beyond the end of the file as a damaged length says."""
    path = tmp_path / "a.gguf"
    write(path)
    whole = path.read_bytes()
    key = b"tokenizer.ggml.token_type"
    at = whole.index(key) + len(key) + 8  # after the types of the field and of its elements
    start = time.monotonic()
    assert_each_is_named({"cut off": whole[:at] + (2**61).to_bytes(8, "little") + whole[at + 8:]}, path, monkeypatch,
                         capsys)
    assert time.monotonic() - start < 10


def test_names_of_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Fails if a GGUF file is known by a suffix in small letters alone, or a folder of such a name is taken for one."""
    monkeypatch.chdir(tmp_path)
    for name, out in (("UPPER.GGUF", "UPPER"), ("Mixed.Gguf", "Mixed"), ("a.gguf", "a"), ("blob", "blob")):
        write(tmp_path / "in/name.gguf")
        (tmp_path / "in/name.gguf").rename(tmp_path / "in" / name)
        assert run(monkeypatch, f"in/{name}") == 0
        assert capsys.readouterr().out == f"checkpoints/in/{out}\n"
        load_model(tmp_path / "checkpoints/in" / out)
    (tmp_path / "folder.gguf").mkdir()
    assert run(monkeypatch, "folder.gguf", "--out", "out") == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize("architecture, words", [
    ("phi3", "<|user|> ▁hi <|end|> <|assistant|>"),
    ("llama", "<|user|> ▁ <0x0A> h i <|end|> ▁ <0x0A> <|assistant|> ▁ <0x0A>")])
def test_phi3_drops_line_ends(architecture: str, words: str, tmp_path: Path) -> None:
    """Fails if the line ends behind Phi-3's special tokens, which are theirs, become tokens of the prompt, or if those
    of other models are lost."""
    marks = ["<|user|>", "<|end|>", "<|assistant|>", "<|endoftext|>"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "▁h", "▁hi", *marks]
    ggml = {"model": "llama", "pre": "default", "tokens": tokens, "scores": [0.0] * 262 + [-1.0, -2.0] + [0.0] * 4,
            "token_type": [2, 3, 4] + [6] * 256 + [1] * 5 + [3] * 4, "bos_token_id": 1, "eos_token_id": 267}
    write_gguf_tokenizer({"general.architecture": architecture} | {f"tokenizer.ggml.{k}": v for k, v in ggml.items()},
                         tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("<|user|>\nhi<|end|>\n<|assistant|>\n", False)
    assert [tokenizer.bpe.id_to_token(i) for i in ids] == words.split()
    assert len(tokenizer.encode("<|endoftext|>\n", False)) == 3
