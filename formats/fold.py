"""A family's tensors as those of a plain Llama: what model.py does not compute is done to the weights, once, in fp32.

    split      q, k, v or gate, up in one matrix            Phi-3, GLM
    reorder    rows of q and k, so that RoPE's pairs are    Phi-4-mini, GLM, ERNIE 4.5, Helium
               (j, j + D / 2) of each head
    multiply   embedding, lm_head, attention and residual   Granite
               branches

Attention sees only products of a query with a key, so rows that are reordered in both change nothing.
"""
import torch
from torch import Tensor

from formats.config import Config
from formats.families import FAMILIES, GRANITE, llama_words
from formats.fields import positive
from formats.hf import LazyTensor

QKV = ("q_proj", "k_proj", "v_proj")


def fold(tensors: dict[str, LazyTensor], raw: dict, cfg: Config) -> dict[str, LazyTensor]:
    """The tensors, by Hugging Face's names, of the Llama that computes what this model does. raw: its config.json."""
    raw = llama_words(raw)
    family = FAMILIES[raw["model_type"]]
    tensors = split_fused(tensors, cfg)
    if family.interleaved or cfg.rotary_dim:
        order = row_order(cfg.head_dim, cfg.rotated, family.interleaved)
        for name, tensor in tensors.items():
            if name.rpartition(".")[0].endswith((".q_proj", ".k_proj")):
                heads = torch.arange(0, tensor.shape[0], cfg.head_dim)
                tensors[name] = rows_of(tensor, (heads[:, None] + order).flatten())
    if raw["model_type"] == "granite":
        tensors = multiply_granite(tensors, raw, cfg)
    return tensors


def rows_of(tensor: LazyTensor, rows: slice | Tensor) -> LazyTensor:
    """Rows of a tensor, chosen when it is read. Packed rows stay packed."""
    packed = tensor.packed
    if packed is not None:
        all_rows = torch.arange(tensor.shape[0]) if packed.rows is None else packed.rows
        packed = packed._replace(rows=all_rows[rows])
    count = len(rows) if isinstance(rows, Tensor) else rows.stop - rows.start
    return LazyTensor((count, *tensor.shape[1:]), lambda: tensor.read()[rows], packed)


def split_fused(tensors: dict[str, LazyTensor], cfg: Config) -> dict[str, LazyTensor]:
    """With q, k, v and gate, up apart. Each piece reads the whole matrix; in a safetensors file that costs nothing.
    Raises ValueError where its rows are not as many as config.json says."""
    rows = [cfg.num_heads * cfg.head_dim] + [cfg.num_kv_heads * cfg.head_dim] * 2
    pieces = {"qkv_proj": (QKV, rows), "gate_up_proj": (("gate_proj", "up_proj"), [cfg.intermediate_size] * 2)}
    result = {}
    for name, tensor in tensors.items():
        *prefix, module, kind = name.split(".")
        if module not in pieces:
            result[name] = tensor
            continue
        names, sizes = pieces[module]
        if tensor.shape[0] != sum(sizes):
            raise ValueError(f"config.json does not fit the weights: {name} has {tensor.shape[0]} rows, not "
                             f"{sum(sizes)}")
        for i, (own, size) in enumerate(zip(names, sizes)):
            start = sum(sizes[:i])
            result[".".join((*prefix, own, kind))] = rows_of(tensor, slice(start, start + size))
    return result


def row_order(head_dim: int, rotary_dim: int, interleaved: bool) -> Tensor:
    """For each new place in a head, which element moves there: int64 [head_dim]. New pair (j, j + head_dim / 2)
    is old pair (2j, 2j + 1) if `interleaved`, else (j, j + rotary_dim / 2). Elements without RoPE follow the pairs."""
    pairs = torch.arange(rotary_dim).view(-1, 2).T if interleaved else torch.arange(rotary_dim).view(2, -1)
    return torch.cat((pairs, torch.arange(rotary_dim, head_dim).view(2, -1)), 1).flatten()


def multiply_granite(tensors: dict[str, LazyTensor], raw: dict, cfg: Config) -> dict[str, LazyTensor]:
    """Granite multiplies embeddings and both residual branches, divides logits, and scales attention by another number
    than D ** -0.5. Its lm_head, where it is the embedding, becomes a matrix of its own.

    In bf16, products with numbers that are no powers of two are rounded once more. A draft head that is trained here
    reads the embeddings so multiplied (an EAGLE-3 head norms them first)."""
    factors = {key: positive(raw, key, kind=float) for key in GRANITE}
    embedding, lm_head = "model.embed_tokens.weight", "lm_head.weight"
    by_module = {
        "embed_tokens": factors["embedding_multiplier"], "lm_head": 1 / factors["logits_scaling"],
        "o_proj": factors["residual_multiplier"], "down_proj": factors["residual_multiplier"],
        "q_proj": factors["attention_multiplier"] * cfg.head_dim ** 0.5}
    result = tensors if lm_head in tensors else {**tensors, lm_head: tensors[embedding]}
    for name, tensor in result.items():
        factor = by_module.get(name.split(".")[-2], 1.0)
        if factor != 1:
            packed = tensor.packed and tensor.packed._replace(factor=tensor.packed.factor * factor)
            result[name] = LazyTensor(tensor.shape, lambda t=tensor, factor=factor: t.read().float() * factor, packed)
    return result
