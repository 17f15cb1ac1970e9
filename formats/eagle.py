"""EAGLE heads on the disk: where they lie, and the names of their tensors."""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from formats.config import Config

VOCAB = "draft_vocab.json"  # the target's most frequent tokens, most frequent first
CURVE = "acceptance.json"  # what trees of each size gain a cycle, see autotree.py


def folder_of(path: Path) -> Path:
    """A checkpoint's or a head's folder, be it named itself or by a file in it."""
    return path.parent if path.is_file() else path


def find_head(checkpoint: Path) -> Path:
    """The head that belongs to a checkpoint, a folder or a model file in it: the folder eagle, or what has the file's
    name in there, as model-int8.safetensors has if the head was quantised too."""
    folder = folder_of(checkpoint)
    file = folder / "eagle" / checkpoint.name
    return file if checkpoint.is_file() and file.is_file() else folder / "eagle"


def read_vocab(path: Path, vocab_size: int, limit: int | None) -> Tensor:
    """The first `limit` (None: all) ids of a list of the most frequent ones, ascending, [at least 10] int64."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; train.py --draft_vocab makes it")
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        ids = None
    if not (isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids)
            and len(ids) == len(set(ids)) >= 10):
        raise ValueError(f"{path}: should be a list of 10 or more different ids below {vocab_size}")
    if limit and not 10 <= limit <= len(ids):
        raise ValueError(f"{path} lists {len(ids)} tokens: --draft_vocab takes 10 to {len(ids)}, or 0 for all tokens")
    return torch.tensor(sorted(ids[:limit]))


def native_names(published: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Published tensors under this file's names, q/k/v and gate/up fused. The names we do not know stay, and
    `fill` refuses them."""
    tensors = {name: t for name, t in published.items()
               if name != "embed_tokens.weight" and not name.endswith("rotary_emb.inv_freq")}
    fused = {"layer.wqkv.weight": [f"layers.0.self_attn.{x}_proj.weight" for x in "qkv"],
             "layer.wqkv.bias": [f"layers.0.self_attn.{x}_proj.bias" for x in "qkv"],
             "layer.wo.weight": ["layers.0.self_attn.o_proj.weight"],
             "layer.mlp_norm.weight": ["layers.0.post_attention_layernorm.weight"],
             "layer.w13.weight": ["layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"],
             "layer.w2.weight": ["layers.0.mlp.down_proj.weight"]}
    for name, parts in fused.items():
        found = [tensors.pop(part) for part in parts if part in tensors]
        if len({t.shape[1:] for t in found}) > 1 or len(found) not in (0, len(parts)):
            raise ValueError(f"{path}: {', '.join(parts)} do not fit together")
        if found:
            tensors[name] = torch.cat(found) if len(found) > 1 else found[0]
    return tensors


def save_head(cfg: Config, state: dict[str, Tensor], out: Path) -> None:
    """The format of EAGLE-1/2 heads on the hub: bf16 tensors under Hugging Face's names, q/k/v and gate/up apart."""
    state = {k: v.detach().to("cpu", torch.bfloat16) for k, v in state.items()}
    attention, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    q, k, v = state["layer.wqkv.weight"].split((attention, kv, kv))
    gate, up = state["layer.w13.weight"].chunk(2)
    tensors = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
               "self_attn.o_proj": state["layer.wo.weight"], "mlp.gate_proj": gate, "mlp.up_proj": up,
               "mlp.down_proj": state["layer.w2.weight"], "post_attention_layernorm": state["layer.mlp_norm.weight"]}
    tensors = {"fc.weight": state["fc.weight"], **{f"layers.0.{k}.weight": v.contiguous() for k, v in tensors.items()}}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": cfg.hidden_size,
              "intermediate_size": cfg.intermediate_size, "num_hidden_layers": 1, "num_attention_heads": cfg.num_heads,
              "num_key_value_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim, "hidden_act": "silu",
              "rms_norm_eps": cfg.rms_norm_eps, "rope_theta": cfg.rope_theta, "vocab_size": cfg.vocab_size,
              "max_position_embeddings": cfg.max_position_embeddings, "bias": False, "tie_word_embeddings": False,
              "torch_dtype": "bfloat16"}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.part")
    (out / "model.part").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_vocab(said: Tensor, out: Path, size: int) -> None:
    """The `size` tokens that the model itself says most often in `said` [any], most frequent first, beside the head:
    drafting then reads only their rows of the lm_head (FR-Spec, arXiv 2502.14856)."""
    counts = torch.bincount(said[said >= 0].long())
    ids = counts.argsort(descending=True, stable=True)[:size]
    out.mkdir(parents=True, exist_ok=True)
    (out / VOCAB).write_text(json.dumps(ids[counts[ids] > 0].tolist()) + "\n", encoding="utf-8")
