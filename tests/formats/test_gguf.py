"""formats/gguf.py: a GGUF file gives the same folder as the Hugging Face folder that it was made from.

    python -m pytest tests/formats/test_gguf.py
"""
import tracemalloc
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from published import LLAMA3, SIZES, assert_nothing_loads, run
from safetensors.torch import load_file, safe_open, save_file
from tokenizers import pre_tokenizers

from convert_hf_checkpoint import convert
from formats.config import Config
from tokenizer import Tokenizer

torch.set_num_threads(1)
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K"]
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 2, 4, 2, 64, 384
GGUF_TO_HF = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
              "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
              "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}


def raw_rows(rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """Random rows of type `kind`, as a file stores them. gguf cannot quantise to Q4_K and Q6_K, so those are random
    bytes; only their half-precision scales are set, to finite numbers."""
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
    """Tokens, types and merges of a small byte-level BPE whose ids differ for each way to cut a text into words."""
    merges = ["1 2", "12 3", "123 4", "Ġ 1", "' S", "Ġ h", "Ġh i"]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges] + ["xyz"]
    types = [1] * len(tokens)
    unused = VOCAB - 4 - len(tokens)
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
    """Write a small random GGUF file. Returns its weights, dequantised, in Hugging Face's names and row order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    rng = np.random.default_rng(0)
    kind = gguf.GGMLQuantizationType[kind]
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
    q = HEADS * HEAD_DIM
    kv = KV_HEADS * HEAD_DIM
    tensors = {}
    shapes = {"attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN), "attn_v.weight": (kv, HIDDEN),
              "attn_output.weight": (HIDDEN, q), "ffn_gate.weight": (INTERMEDIATE, HIDDEN), "attn_norm.weight": HIDDEN,
              "ffn_up.weight": (INTERMEDIATE, HIDDEN), "ffn_down.weight": (HIDDEN, INTERMEDIATE),
              "ffn_norm.weight": HIDDEN}
    if arch == "qwen2":
        shapes |= {"attn_q.bias": q, "attn_k.bias": kv, "attn_v.bias": kv}
    if arch == "qwen3":
        shapes |= {"attn_q_norm.weight": HEAD_DIM, "attn_k_norm.weight": HEAD_DIM}
    every = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": HIDDEN}
    if not tied:
        every["output.weight"] = (VOCAB, HIDDEN)
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
    """Save the Hugging Face folder that a file of write_gguf could have been made from."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}
    config[arch](vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-5,
                 rope_theta=500000.0, max_position_embeddings=4096, tie_word_embeddings=tied).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_gguf_types(kind, tmp_path):
    """Fails if a block format is decoded wrong, or if the rows of q and k stay in llama.cpp's order."""
    tensors = write_gguf(tmp_path / "a.gguf", kind=kind)
    as_hf(tmp_path / "hf", tensors, "llama", tied=False)
    convert(tmp_path / "a.gguf", tmp_path / "ours")
    convert(tmp_path / "hf", tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].isfinite().all() for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_architectures(arch, tied, tmp_path):
    """Fails if rows of a Qwen model are reordered, biases or q/k norms are lost, or the config is not the same."""
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
    """Fails if converting needs the memory of the whole model in fp32."""
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
    """Fails if Llama 3's scaling is dropped, which only shows in long texts, or if another scaling is taken for it."""
    rope = LLAMA3 | {"factor": factor}
    config = transformers.LlamaConfig(**SIZES | {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 64},
                                      rope_parameters=rope)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2).float() / 64)
    divisors = (plain / scaled).numpy()
    write_gguf(tmp_path / "a.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    convert(tmp_path / "a.gguf", tmp_path / "out")
    expected = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta")}
    scaling = Config.load(tmp_path / "out").rope_scaling
    assert scaling.pop("rope_type") == "llama3" and scaling == pytest.approx(expected)
    divisors[20] *= 1.01
    write_gguf(tmp_path / "b.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        convert(tmp_path / "b.gguf", tmp_path / "other")
    assert_nothing_loads(tmp_path / "other")


def longrope(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_factor(4.0)


@pytest.mark.parametrize("change, message", [
    ({"arch": "gemma"}, "gemma"), ({"extra": longrope}, "longrope"), ({"kind": "I8"}, "I8"),
    ({"tokenizer": partial(bpe_metadata, pre="bloom")}, "bloom"),
    ({"tokenizer": partial(bpe_metadata, pre="default")}, "default"),
    ({"tokenizer": lambda writer: writer.add_tokenizer_model("gpt2")}, r"tokenizer\.ggml"),
    ({"tokenizer": lambda writer: (bpe_metadata(writer, "qwen2"), writer.add_uint16("split.count", 3))}, "3 file"),
    ({"extra": lambda writer: writer.add_tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 2), np.float32))}, "_exps")])
def test_gguf_that_is_not_supported_is_named(change, message, tmp_path):
    """Fails if an unknown pre-tokenizer or RoPE is accepted: the model would run and write worse text."""
    write_gguf(tmp_path / "a.gguf", **change)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "a.gguf", tmp_path / "out")
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 3, 100, 0.5, 0.99])
def test_truncated_gguf_ends_in_one_line(cut, tmp_path, monkeypatch, capsys):
    """Fails if half a download ends in a traceback, or is converted."""
    write_gguf(tmp_path / "a.gguf", kind="Q8_0")
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "a.gguf").write_bytes(data[:cut if isinstance(cut, int) else int(cut * len(data))])
    assert run(monkeypatch, tmp_path / "a.gguf", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "a.gguf" in error
    assert_nothing_loads(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("pre, pieces", [
    ("smollm", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T ' S", "e\u0301": "e Ì ģ", "xyz": "x y z"}),
    ("gpt-2", {"1234": "1234", " 1": "Ġ1", "IT'S": "I T ' S", "e\u0301": "e Ì ģ", "xyz": "x y z"}),
    ("llama-bpe", {"1234": "123 4", " 1": "Ġ 1", "IT'S": "I T 'S", "e\u0301": "e Ì ģ", "xyz": "xyz"}),
    ("llama-v3", {"1234": "123 4", "IT'S": "I T 'S", "xyz": "xyz"}),  # another name of llama-bpe
    ("smaug-bpe", {"1234": "123 4", " 1": "Ġ 1", "IT'S": "I T 'S", "e\u0301": "e Ì ģ", "xyz": "x y z"}),
    ("deepseek-r1-qwen", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T 'S", "xyz": "x y z"}),
    ("qwen2", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T 'S", "e\u0301": "Ã ©", "xyz": "x y z"}),
    ("tekken", {"1234": "1 2 3 4", " 1": "Ġ 1", "IT'S": "I T 'S", "aHI hi": "a H I Ġhi", "xyz": "xyz"}),
    ("gpt-4o", {"1234": "123 4", " 1": "Ġ 1", "IT'S": "I T 'S", "aHI hi": "a H I Ġhi", "xyz": "x y z"})])
def test_gguf_byte_level_tokenizer(pre, pieces, tmp_path):
    """Fails if a text is cut into words the wrong way: the ids are valid, but the model knows others."""
    write_gguf(tmp_path / "a.gguf", tokenizer=partial(bpe_metadata, pre=pre))
    convert(tmp_path / "a.gguf", tmp_path / "out")
    tokens = bpe_vocabulary()[0]
    ours, theirs = Tokenizer(tmp_path / "out"), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    bos = [VOCAB - 4] if pre in ("llama-bpe", "llama-v3", "tekken") else []
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
    """Fails if merges are in a wrong order, byte fallback is lost, or the leading space is lost or doubled."""
    letters = "".join(np.random.default_rng(1).choice(list("the cats"), 9000))  # many possible merges
    (tmp_path / "text").write_text("\n".join(letters[i:i + 60] for i in range(0, 9000, 60)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spm"), model_type="bpe", vocab_size=VOCAB,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<tool>"], character_coverage=1.0, num_threads=1)
    spm = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    order = np.random.default_rng(0).permutation(VOCAB).tolist()  # so that the order of ids is not that of scores

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
