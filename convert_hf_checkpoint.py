"""Turn a Hugging Face folder, a hub id or a GGUF file into the one kind of folder that the other scripts read.

    python convert_hf_checkpoint.py meta-llama/Llama-2-7b-chat-hf --eagle yuhuili/EAGLE-llama2-chat-7B
    python convert_hf_checkpoint.py SmolLM2-135M-Instruct.Q4_1.gguf --out checkpoints/demo
    python convert_hf_checkpoint.py checkpoints/meta-llama/Llama-2-7b-chat-hf --eagle path/to/another/head

The folder (default: checkpoints/ and the hub id, or the last two parts of the path) gets config.json and tokenizer
files as published (GGUF: made from its metadata), model.safetensors with q, k, v and gate, up fused, and eagle/, a
draft head as published. Memory is needed for one tensor at a time. Files appear when all are written, config.json last.
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from huggingface_hub import constants, errors, snapshot_download
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from draft import CURVE, VOCAB, load_head
from model import FORMAT, Config, Llama, read_tensors
from tensor_files import write_file
from tokenizer_files import LLAMA3_SPLIT, read_json

FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"}
NAMES = {  # our modules, and those of Hugging Face that they stack along the rows, in this order
    "embed": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head", "attn_norm": "input_layernorm",
    "wqkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm", "wo": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "w13": "mlp.gate_proj mlp.up_proj", "w2": "mlp.down_proj"}
GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
GGUF_ARCHS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
Lazy = tuple[tuple[int, ...], Callable[[], Tensor]]  # the shape of a tensor, and how to read it


def hf_names(name: str, table: dict[str, str]) -> list[str]:
    """Hugging Face's names for our "layers.3.wqkv.bias" or GGUF's "blk.3.attn_q.bias"; the name itself if unknown."""
    *layer, module, kind = name.split(".")
    prefix = f"model.layers.{layer[-1]}." if layer else ""
    return [f"{prefix}{theirs}.{kind}" for theirs in table[module].split()] if module in table else [name]


def open_folder(folder: Path) -> dict[str, Lazy]:
    """The memory-mapped tensors of a Hugging Face folder, in one file or in the shards that an index names."""
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / kind for kind in kinds if (folder / kind).is_file()), None)
    if path is None:
        raise ValueError(f"no weights; one of {', '.join(kinds)} should be there")
    index = read_json(path)["weight_map"] if path.suffix == ".json" else {"": path.name}
    tensors = {}
    for file in sorted(set(map(str, index.values()))):
        if Path(file).name != file or not (folder / file).is_file():
            raise ValueError(f"{path}: names {file!r}, which is not a file of its folder; finish the download")
        found = read_tensors(folder / file)[0]
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError(f"{folder / file}: holds other things than plain tensors; use a safetensors version")
        tensors |= {str(name): (tuple(t.shape), t.detach) for name, t in found.items()}
    return tensors


def open_gguf(path: Path) -> tuple[dict, dict[str, Lazy]]:
    """The metadata of a GGUF file and its tensors, still unread, in Hugging Face's names and order of rows."""
    reader = GGUFReader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    arch, parts = meta["general.architecture"], meta.get("split.count", 0)
    if arch not in GGUF_ARCHS or parts > 1:
        raise ValueError(f"a {arch} model in {max(parts, 1)} file(s), but what can be converted is one file of "
                         f"{', '.join(GGUF_ARCHS)} (llama-gguf-split --merge joins several)")

    def read(tensor) -> Tensor:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if arch == "llama" and (which := re.search(r"\.attn_([qk])\.", tensor.name)):
            # llama.cpp rotates neighbours (2j, 2j+1) where Hugging Face rotates (j, j + head_dim/2)
            heads = meta["llama.attention.head_count" + {"q": "", "k": "_kv"}[which[1]]]
            return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
        return weight

    return meta, {hf_names(tensor.name, GGUF_NAMES)[0]: (tuple(tensor.shape[::-1].tolist()), partial(read, tensor))
                  for tensor in reader.tensors}


def gguf_config(meta: dict, tensors: dict[str, Lazy], dtype: torch.dtype) -> dict:
    """Hugging Face's config.json for GGUF metadata. Takes rope_freqs.weight out of `tensors`."""
    arch = meta["general.architecture"]
    here = {key.removeprefix(f"{arch}."): value for key, value in meta.items() if key.startswith(f"{arch}.")}
    heads, theta = here["attention.head_count"], here.get("rope.freq_base", 1e4)
    head_dim = here.get("attention.key_length", here["embedding_length"] // heads)
    config = {
        "architectures": [GGUF_ARCHS[arch]], "model_type": arch, "hidden_act": "silu", "head_dim": head_dim,
        "hidden_size": here["embedding_length"], "intermediate_size": here["feed_forward_length"],
        "num_hidden_layers": here["block_count"], "num_attention_heads": heads,
        "num_key_value_heads": here["attention.head_count_kv"], "max_position_embeddings": here["context_length"],
        "rms_norm_eps": float(f"{here['attention.layer_norm_rms_epsilon']:.7g}"),  # float32: 1e-5 reads 9.99999974e-06
        "rope_theta": theta, "partial_rotary_factor": here.get("rope.dimension_count", head_dim) / head_dim,
        "rope_scaling": {"rope_type": here.get("rope.scaling.type", "none").replace("none", "default")},
        "vocab_size": tensors["model.embed_tokens.weight"][0][0], "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"), "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": "lm_head.weight" not in tensors}
    if "rope_freqs.weight" in tensors:  # Llama 3.1's and 3.2's scaling, stored as what it divides each frequency by
        divisors = tensors.pop("rope_freqs.weight")[1]().double()
        factor, low, high, context = float(divisors.max()), 1.0, 4.0, 8192
        turns = context / (2 * math.pi) / theta ** (torch.arange(len(divisors), dtype=torch.float64) / len(divisors))
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        if not torch.allclose(divisors, 1 / (keep + (1 - keep) / factor), rtol=1e-5):
            raise ValueError("rope_freqs.weight is not the scaling of Llama 3.1 or 3.2: start from the HF folder")
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low,
                                  "high_freq_factor": high, "original_max_position_embeddings": context}
    return config


def write_gguf_tokenizer(meta: dict, folder: Path) -> None:
    """tokenizer.json (byte-level BPE, cut into words as `pre` says, or sentencepiece BPE) and its two companions."""
    ggml = {key.removeprefix("tokenizer.ggml."): value for key, value in meta.items()}
    tokens, types, kind, pre = ggml["tokens"], ggml["token_type"], ggml["model"], ggml.get("pre")
    vocab = {token: i for i, token in enumerate(tokens)}
    words = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
             "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")],
             "qwen2": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")]}
    if kind == "gpt2" and pre in words:
        merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*words[pre], byte_level])
        tokenizer.normalizer = normalizers.NFC() if pre == "qwen2" else None
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "llama":  # sentencepiece has no list of merges: what makes the piece with the highest score goes first
        pairs = [(-ggml["scores"][i], i, vocab[token[:cut]], vocab[token[cut:]]) for i, token in enumerate(tokens)
                 if types[i] == 1 for cut in range(1, len(token)) if token[:cut] in vocab and token[cut:] in vocab]
        merges, unk = [(tokens[a], tokens[b]) for *_, a, b in sorted(pairs)], tokens[ggml.get("unknown_token_id", 0)]
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
        space, replace = ggml.get("add_space_prefix", True), normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * space + [replace])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
                                              + [decoders.Strip(" ", 1, 0)] * space)
    else:
        raise ValueError(f"GGUF tokenizer {kind!r}, pre-tokenizer {pre!r}: supported are 'llama', and 'gpt2' with "
                         f"{', '.join(words)}; start from the Hugging Face folder")
    # types: 2 unknown, 3 control; 4 user-defined is found in text like those, but is shown when decoding
    tokenizer.add_tokens([AddedToken(token, special=sort != 4, normalized=False)
                          for token, sort in zip(tokens, types) if sort in (2, 3, 4)])
    named = {f"{key}_token": tokens[ggml[f"{key}_token_id"]] for key in ("bos", "eos") if f"{key}_token_id" in ggml}
    bos = [named.get("bos_token")] * ggml.get("add_bos_token", kind == "llama" or pre == "llama-bpe")  # as llama.cpp
    tokenizer.post_processor = processors.TemplateProcessing([*bos, "$A"], special_tokens=[(t, vocab[t]) for t in bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(bos), **named,
              "chat_template": meta.get("tokenizer.chat_template"), "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    stops = {"eos_token_id": [ggml[key] for key in ("eos_token_id", "eot_token_id", "eom_token_id") if key in ggml]}
    (folder / "generation_config.json").write_text(json.dumps(stops, indent=2))


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """A scratch folder in `out`; its files move up, config.json last, unless something went wrong."""
    part, made = out / ".part", [folder for folder in (out, *out.parents) if not folder.exists()]
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        old = ("config.json", *FILES, CURVE, "model.safetensors", "pytorch_model.bin")  # never mix old and new
        for file in (*map(out.joinpath, old), *out.glob("model-int*.safetensors")):
            file.unlink(missing_ok=True)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
    except Exception as err:  # whatever is wrong with the source or the disk
        why = f"{err} is missing" if isinstance(err, KeyError) else err
        raise ValueError(f"{source} -> {out} failed: {why}") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # the first one is not empty: all went well
            for folder in made:
                folder.rmdir()


def write_weights(path: Path, tensors: dict[str, Lazy], config: Config, dtype: torch.dtype, source: str) -> None:
    """The tensors of a Llama, each of one or more pieces."""
    with torch.device("meta"):
        wanted = Llama(config, qkv_bias=any(name.endswith("q_proj.bias") for name in tensors)).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    pieces = {ours: hf_names(ours, NAMES) for ours in wanted}
    names = [name for theirs in pieces.values() for name in theirs]
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if missing or unknown:
        raise ValueError(f"config.json does not fit the weights: missing {missing[:4]}, not implemented {unknown[:4]}")
    for ours, like in wanted.items():
        found = [tensors[name][0] for name in pieces[ours]]
        if sum(map(math.prod, found)) != like.numel() or any(shape[1:] != like.shape[1:] for shape in found):
            raise ValueError(f"config.json does not fit the weights: {pieces[ours]} {found} make no {list(like.shape)}")
        wanted[ours] = like.to(dtype)
    metadata = {"format": FORMAT, "source": source, "dtype": str(dtype).removeprefix("torch.")}
    write_file(path, wanted, (tensors[name][1]().to(dtype) for name in names), metadata, "converting")


def convert(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16, name: str | None = None) -> None:
    """Write the folder `out` from `source`, a Hugging Face folder or a .gguf file, with all weights in `dtype`.

    `name` is what the metadata calls the source. ValueError, and `out` as it was, if anything is wrong.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: the source itself would be overwritten; choose another --out")
    with staged(out, source) as part:
        if source.suffix == ".gguf":
            meta, tensors = open_gguf(source)
            (part / "config.json").write_text(json.dumps(gguf_config(meta, tensors, dtype), indent=2))
            config = Config.load(part)
            write_gguf_tokenizer(meta, part)
        else:
            config, tensors = Config.load(source / "config.json"), open_folder(source)
            for file in FILES & set(os.listdir(source)):
                shutil.copyfile(source / file, part / file)
        head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        if head and not torch.equal(head[1](), tensors["model.embed_tokens.weight"][1]()):  # the weights know better
            raw = read_json(part / "config.json") | {"tie_word_embeddings": False}
            (part / "config.json").write_text(json.dumps(raw, indent=2))
            config, tensors["lm_head.weight"] = Config.load(part), head
        write_weights(part / "model.safetensors", tensors, config, dtype, name or source.resolve().name)


def add_eagle(head: Path, out: Path) -> None:
    """Copy a published EAGLE-1/2 head to `out`/eagle as it is. ValueError if it would not load there."""
    with torch.device("meta"):
        target = Llama(Config.load(out))
    load_head(head, target)
    with staged(out / "eagle", head) as part:
        for file in {"config.json", "model.safetensors", "pytorch_model.bin", VOCAB, CURVE} & set(os.listdir(head)):
            shutil.copyfile(head / file, part / file)


def fetch(source: str, token: str | None, is_target: bool) -> Path:
    """A path as it is, or the snapshot of a hub id. A target that is not implemented is refused before the download."""
    if Path(source).exists():
        return Path(source)
    page, download = f"{constants.ENDPOINT}/{source}", partial(snapshot_download, source, token=token)
    try:
        folder = Path(download(allow_patterns=["config.json"]))
        if is_target:
            Config.load(folder)
        folder = Path(download(allow_patterns=[*FILES, "model*.safetensors", "model.safetensors.index.json"]))
        if not any(folder.glob("model*.safetensors")):
            download(allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"])
        return folder
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        why = "gated" if isinstance(err, errors.GatedRepoError) else "neither a path here nor a public repository"
        raise OSError(f"{source} is {why}: check the name or ask for access at {page}; then `hf auth login`") from err
    except ValueError:
        raise
    except Exception as err:  # network errors have other classes in every version of huggingface_hub
        raise OSError(f"{source}: downloading {page} failed ({type(err).__name__}: {str(err).splitlines()[0]}); "
                      "check the page and the network, then run this again: files that are whole are kept") from err


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hugging Face folder, hub id (org/name) or .gguf file; or a converted folder")
    parser.add_argument("--out", type=Path, help="the folder to write (default: checkpoints/org/name)")
    parser.add_argument("--eagle", metavar="ID_OR_DIR", help="also copy this draft head, to <out>/eagle")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--token", help="hub token (default: that of `hf auth login`)")
    args = parser.parse_args()
    try:
        source = fetch(args.source, args.token, is_target=True)
        name = "/".join(source.resolve().parts[-2:]) if source == Path(args.source) else args.source
        out = args.out or Path("checkpoints", name.removesuffix(".gguf"))
        head = fetch(args.eagle, args.token, is_target=False) if args.eagle else None
        file = source / "model.safetensors"
        if file.is_file() and read_tensors(file)[1].get("format") == FORMAT:
            out = source  # it is converted already; only a head is to be added
        else:
            convert(source, out, getattr(torch, args.dtype), name)
        if head:
            add_eagle(head, out)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    print(out)


if __name__ == "__main__":
    main()
