"""EAGLE heads on disk: where the files are, and the names of the tensors."""
import json
from pathlib import Path

import torch
from torch import Tensor

from formats.config import Config
from formats.foreign import kind_of_head, pickled_by, quantized_by_config, quantized_by_tensors
from formats.weights import read_tensors, save_tensors
from formats.writing import replace_files

VOCAB = "draft_vocab.json"  # beside a head: the target's most frequent tokens, most frequent first
CURVE = "acceptance.json"  # beside a head: tokens per step for each size of tree (drafters/tree_size.py)


# ----- Finding and reading -----------------------------------------------------------------------------------------


def folder_of(path: Path) -> Path:
    """The folder of a checkpoint or a head. `path` is the folder itself or a file in it."""
    return path.parent if path.is_file() else path


def find_head(checkpoint: Path, name: str = "eagle") -> Path:
    """The draft head that belongs to a checkpoint, which is a folder or a model file in it.

    This is the folder `name` of the checkpoint, eagle/, eagle3/ or block/. For a model file it is the file of the same
    name there, if there is one: eagle/model-int8.safetensors belongs to model-int8.safetensors.
    """
    folder = folder_of(checkpoint) / name
    if checkpoint.is_file():
        file = folder / checkpoint.name
        if file.is_file():
            return file
    return folder


def open_head(path: Path, *kinds: str) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    """The weight file of a head (`path`: its folder, or one file in it), its tensors and its metadata. kinds: those
    that are accepted, of "EAGLE-1/2", "EAGLE-3" and "block".

    Raises FileNotFoundError, or ValueError if the file is damaged, quantised by others, or a head of another kind.
    """
    folder = folder_of(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no draft head there; fetch one with `convert_hf_checkpoint.py ... "
                                "--eagle ID`, train one with train.py, or name its folder with --draft")
    raw = read_config(folder)
    files = [path] if path.is_file() else [folder / "model.safetensors", folder / "pytorch_model.bin"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        names = [file.name for file in sorted(folder.glob("*_lm_head.*"))]  # of Medusa and Hydra
        other = kind_of_head(names, raw)
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there"
                                + (f": these are {other}" if other else ""))
    if quantized := pickled_by(file):
        raise ValueError(f"{file}: {quantized}")
    tensors, metadata = read_tensors(file)
    tensors = {str(name): tensor for name, tensor in tensors.items()}  # a pickle may have others
    found = kind_of_head(tensors, raw)
    if found and not any(found.startswith((f"an {kind} head", f"a {kind} head")) for kind in kinds):
        raise ValueError(f"{file}: holds {found}; only {' and '.join(kinds)} heads can be given here")
    if quantized := quantized_by_tensors(tensors) or quantized_by_config(raw, is_head=True):
        raise ValueError(f"{file}: {quantized}")
    return file, tensors, metadata


def read_config(folder: Path) -> dict:
    """The config.json in a folder as it is; {} if there is none, or no JSON object. Config.load checks it."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def read_vocab(path: Path, vocab_size: int, limit: int | None) -> Tensor:
    """The first `limit` ids of a draft_vocab.json (None: all of them), in ascending order: [at least 10] int64.

    Raises FileNotFoundError, or ValueError if the file is not a list of at least 10 different ids below `vocab_size`,
    or if `limit` is below 10 or above the list's length.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; train.py --draft_vocab makes it")
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        ids = None
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
            and len(ids) == len(set(ids)) >= 10):
        raise ValueError(f"{path}: should be a list of 10 or more different ids below {vocab_size}")
    if limit is not None and not 10 <= limit <= len(ids):
        raise ValueError(f"{path} lists {len(ids)} tokens: --draft_vocab takes 10 to {len(ids)}, or 0 for all tokens")
    return torch.tensor(sorted(ids[:limit]))


def native_names(published: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a published head under the names of draft.EagleHead, with q, k, v and gate, up fused.

    A copy of the target's embedding and RoPE buffers are dropped. Tensors that already have our names stay. So do
    unknown ones, which `formats.weights.fill` refuses later. Raises ValueError naming `path` if only some of the
    tensors to fuse are there, or if their shapes do not fit together.
    """
    tensors = {name: t for name, t in published.items()
               if name != "embed_tokens.weight" and not name.endswith("rotary_emb.inv_freq")}
    sources = {"layer.wqkv.weight": [f"layers.0.self_attn.{x}_proj.weight" for x in "qkv"],
               "layer.wqkv.bias": [f"layers.0.self_attn.{x}_proj.bias" for x in "qkv"],
               "layer.wo.weight": ["layers.0.self_attn.o_proj.weight"],
               "layer.mlp_norm.weight": ["layers.0.post_attention_layernorm.weight"],
               "layer.w13.weight": ["layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"],
               "layer.w2.weight": ["layers.0.mlp.down_proj.weight"]}
    fuse(tensors, sources, path)
    return tensors


def fuse(tensors: dict[str, Tensor], sources: dict[str, list[str]], path: Path) -> None:
    """Put the tensors of sources[name], one below the other, in their place as `name`. A name whose sources are all
    missing is left out. Raises ValueError naming `path` if some are missing, or if their shapes do not fit together."""
    for name, published_names in sources.items():
        found = [tensors.pop(part) for part in published_names if part in tensors]
        fit = len({t.shape[1:] for t in found}) <= 1 and all(t.dim() for t in found)
        if not fit or len(found) not in (0, len(published_names)):
            raise ValueError(f"{path}: {', '.join(published_names)} do not fit together")
        if found:
            tensors[name] = torch.cat(found) if len(found) > 1 else found[0]


# ----- Writing -----------------------------------------------------------------------------------------------------


def save_head(cfg: Config, state: dict[str, Tensor], out: Path) -> None:
    """Write the folder of a head without biases, from its config and its state_dict: model.safetensors and config.json.

    The format is that of EAGLE-1/2 heads on the hub: bf16 tensors under Hugging Face's names, with q, k, v and gate, up
    as tensors of their own.
    """
    state = {name: t.detach().to("cpu", torch.bfloat16) for name, t in state.items()}
    q_rows = cfg.num_heads * cfg.head_dim
    kv_rows = cfg.num_kv_heads * cfg.head_dim
    q, k, v = state["layer.wqkv.weight"].split((q_rows, kv_rows, kv_rows))
    gate, up = state["layer.w13.weight"].chunk(2)
    layer = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
             "self_attn.o_proj": state["layer.wo.weight"], "mlp.gate_proj": gate, "mlp.up_proj": up,
             "mlp.down_proj": state["layer.w2.weight"], "post_attention_layernorm": state["layer.mlp_norm.weight"]}
    tensors = {"fc.weight": state["fc.weight"],
               **{f"layers.0.{name}.weight": t.contiguous() for name, t in layer.items()}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": cfg.hidden_size,
              "intermediate_size": cfg.intermediate_size, "num_hidden_layers": 1, "num_attention_heads": cfg.num_heads,
              "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim, "hidden_act": "silu",
              "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta, "vocab_size": cfg.vocab_size,
              "max_position_embeddings": cfg.max_position_embeddings, "bias": False, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}
    with replace_files(out) as part:
        save_tensors(part / "model.safetensors", tensors)
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_vocab(written: Tensor, out: Path, size: int) -> None:
    """Write draft_vocab.json into the head's folder `out`: the `size` tokens that occur most often in `written`, most
    frequent first. Drafting then reads only their rows of the lm_head (FR-Spec, arXiv 2502.14856).

    written [any] int: tokens that the target wrote itself. Negative entries, which stand for prompts, are skipped. The
    list is shorter if fewer than `size` different tokens occur.
    """
    counts = torch.bincount(written[written >= 0].long())
    ids = counts.argsort(descending=True, stable=True)[:size]
    with replace_files(out) as part:
        (part / VOCAB).write_text(json.dumps(ids[counts[ids] > 0].tolist()) + "\n", encoding="utf-8")
