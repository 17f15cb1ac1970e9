"""Random models of a few thousand weights, in memory and on disk. The same seed gives the same model.

Weights are large enough that attention is sharp and the next token depends on the context. With the small weights that
training starts from, a wrong mask or position would change the output by less than any tolerance. The default is
float64: there the number of rows computed together does not change the tokens.
"""
import json
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from draft import EagleHead
from drafters.block import BlockHead
from drafters.eagle3 import PLAIN, Eagle3Head
from drafters.medusa import MedusaHeads, save_medusa
from drafters.tree_size import NODES
from formats.block import BlockConfig
from formats.block import save_block as save_block_head
from formats.config import Config
from formats.eagle import CURVE, VOCAB
from formats.eagle3 import Eagle3Config, save_eagle3
from formats.tokenizer_files import CHAR_OF
from formats.weights import FORMAT
from model import Llama
from quant.linear import quantize_linears

SHAPE = {"model_type": "llama", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}


def randomise(module: nn.Module, seed: int, dtype: torch.dtype) -> None:
    """Give every parameter random values, and make the module ready for inference. Norms are near 1, biases of the
    order of 0.5, and matrices make their outputs two or three times as large as their inputs."""
    random = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=random, dtype=torch.float64)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif name.endswith("bias"):
            noise = 0.5 * noise
        elif "embed" not in name:
            noise = (3 if "wqkv" in name else 2) * noise / weight.shape[1] ** 0.5
        weight.data = noise.to(dtype)
    module.requires_grad_(False).eval()


def target(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Llama:
    """A Llama whose config.json is SHAPE with `changes`."""
    model = Llama(Config.from_dict(SHAPE | changes))
    randomise(model, seed, dtype)
    return model


def head(model: Llama, seed: int = 1, fc_bias: bool = False, qkv_bias: bool = False, **changes) -> EagleHead:
    """A draft head for `model`, in the same dtype. `changes` are entries of the head's own config.json."""
    shape = {"vocab_size": model.cfg.vocab_size, "hidden_size": model.cfg.hidden_size, "num_hidden_layers": 1}
    eagle = EagleHead(Config.from_dict(SHAPE | shape | changes), fc_bias=fc_bias, qkv_bias=qkv_bias)
    randomise(eagle, seed, model.embed.weight.dtype)
    return eagle


def pair(seed: int = 0, noise: float = 0.3, dtype: torch.dtype = torch.float64, **changes) -> tuple[Llama, EagleHead]:
    """A target, and a head that guesses it well enough that deep nodes of a tree are accepted too.

    With noise 0 a feature is the embedding of its token. The head then knows it exactly, and the next token depends on
    the last one alone. `noise` scales what the layers of both models add to the embedding.
    """
    model = target(seed, dtype, **changes)
    eagle = head(model, seed + 1000)
    size = model.cfg.hidden_size
    embed = model.embed.weight.data
    embed /= embed.pow(2).mean(1, keepdim=True).sqrt()
    model.norm.weight.data.fill_(1)
    eagle.fc.weight.data = torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1).to(dtype)
    for layer in (*model.layers, eagle.layer):
        layer.wo.weight.data *= noise
        layer.w2.weight.data *= noise
    return model, eagle


def head3(model: Llama, seed: int = 2, names: Collection[str] = PLAIN, taps: tuple[int, ...] = (0, 1, 2),
          ids: list[int] | None = None, wide: tuple[bool, ...] = (True,), norm_before_residual: bool = False,
          norm_output: bool = False, **changes) -> Eagle3Head:
    """A random EAGLE-3 head for `model`, in the same dtype. names, taps, wide and so on: see drafters/eagle3.py. ids:
    its draft vocabulary. `changes` are entries of its layers' config.json."""
    size, count = model.cfg.hidden_size, model.cfg.vocab_size
    shape = {"vocab_size": count, "hidden_size": size, "num_hidden_layers": len(wide)}
    eagle = Eagle3Head(Eagle3Config(
        layer=Config.from_dict(SHAPE | shape | changes), target_size=size, target_layers=model.cfg.num_layers,
        taps=taps, wide=wide, draft_vocab_size=len(ids) if ids else count, norm_before_residual=norm_before_residual,
        norm_output=norm_output), names)
    randomise(eagle, seed, model.embed.weight.dtype)
    eagle.vocab = torch.tensor(ids) if ids else None
    return eagle


def pair3(seed: int = 0, noise: float = 0.1, dtype: torch.dtype = torch.float64, ids: list[int] | None = None,
          **changes) -> tuple[Llama, Eagle3Head]:
    """A target, and an EAGLE-3 head that guesses it well, as `pair` makes them: the feature is nearly the embedding of
    its token. The embedding is no part of the head's residual, so its attention has to pass it on. By their biases all
    queries and keys are equal, and after RoPE a row sees nearly only itself."""
    model, _ = pair(seed, noise, dtype, **changes)
    names = (*PLAIN, "layers.0.wqkv.bias")
    eagle = head3(model, seed + 1000, names, ids=ids, num_attention_heads=4, num_key_value_heads=4)
    layer, size = eagle.layers[0], model.cfg.hidden_size
    eagle.fc.weight.data *= 0.01
    eagle.norm.weight.data.fill_(1)
    eagle.lm_head.weight.data = model.lm_head.weight.data[eagle.vocab if ids else slice(None)].clone()
    layer.embed_norm.weight.data.fill_(1)
    layer.wqkv.weight.data.zero_()
    layer.wqkv.weight.data[2 * size:, :size] = torch.eye(size)
    layer.wqkv.bias.data.zero_()
    layer.wqkv.bias.data[:2 * size].view(8, -1)[:, :3] = 12  # pairs that turn by 1, 0.1 and 0.01 a position
    layer.wo.weight.data = torch.eye(size, dtype=dtype) * 3
    layer.w2.weight.data *= noise
    return model, eagle


def block(model: Llama, seed: int = 3, names: Collection[str] = (), ids: list[int] | None = None, layers: int = 2,
          **changes) -> BlockHead:
    """A random block head for `model`, in the same dtype: anchor-first, causal, 6 rows. names, ids: as `head3`'s.
    `changes` are fields of its BlockConfig, or entries of its layers' config.json."""
    size, count = model.cfg.hidden_size, model.cfg.vocab_size
    facts = {"taps": (0, 1, 2), "block_size": 6, "mask_token": 7, "anchor_first": True, "causal": True, "markov": None}
    facts |= {key: changes.pop(key) for key in list(changes) if key in facts}
    shape = {"model_type": "qwen3", "vocab_size": count, "hidden_size": size, "num_hidden_layers": layers}
    eagle = BlockHead(BlockConfig(
        layer=Config.from_dict(SHAPE | shape | changes), target_size=size, target_layers=model.cfg.num_layers,
        windows=(None,) * layers, draft_vocab_size=len(ids) if ids else count, markov_rank=5 if facts["markov"] else 0,
        **facts), names)
    randomise(eagle, seed, model.embed.weight.dtype)
    eagle.vocab = torch.tensor(ids) if ids else None
    return eagle


def config_json(cfg: Config) -> dict:
    """The entries of config.json that give this Config."""
    raw = {"model_type": "qwen3" if cfg.qk_norm else "llama", "num_hidden_layers": cfg.num_layers,
           "num_attention_heads": cfg.num_heads, "num_key_value_heads": cfg.num_kv_heads}
    same = ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rope_theta", "rms_norm_eps",
            "tie_word_embeddings", "max_position_embeddings")
    return raw | {key: getattr(cfg, key) for key in same}


def save_target(model: Llama, folder: Path) -> Path:
    """Save a converted checkpoint, as convert_hf_checkpoint.py writes it, without a tokenizer. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model.state_dict()
    if model.cfg.tie_word_embeddings:
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(config_json(model.cfg)))
    save_file(tensors, folder / "model.safetensors", {"format": FORMAT})
    return folder


def published(eagle: EagleHead) -> dict[str, Tensor]:
    """The tensors of a head under the names that heads on the hub have, with q, k, v and gate, up apart."""
    cfg = eagle.cfg
    own = eagle.state_dict()
    names = {"layer.wo.weight": "layers.0.self_attn.o_proj.weight", "layer.w2.weight": "layers.0.mlp.down_proj.weight",
             "layer.mlp_norm.weight": "layers.0.post_attention_layernorm.weight"}
    tensors = {names.get(name, name): t for name, t in own.items() if "wqkv" not in name and "w13" not in name}
    for kind in ("weight", "bias"):
        if f"layer.wqkv.{kind}" in own:
            rows = [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
            for x, part in zip("qkv", own[f"layer.wqkv.{kind}"].split(rows), strict=True):
                tensors[f"layers.0.self_attn.{x}_proj.{kind}"] = part.clone()
    for x, part in zip(("gate", "up"), own["layer.w13.weight"].chunk(2), strict=True):
        tensors[f"layers.0.mlp.{x}_proj.weight"] = part.clone()
    return tensors


def save_head(eagle: EagleHead, folder: Path, **extra: Tensor) -> Path:
    """Save a draft head as published: config.json and model.safetensors, with `extra` tensors too. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(eagle.cfg)))
    save_file(published(eagle) | {name: t.contiguous() for name, t in extra.items()}, folder / "model.safetensors")
    return folder


def save_head3(eagle: Eagle3Head, folder: Path) -> Path:
    """Save an EAGLE-3 head as published. Returns the folder."""
    save_eagle3(eagle.cfg, eagle.state_dict(), eagle.vocab, folder)
    return folder


def save_block(eagle: BlockHead, folder: Path) -> Path:
    """Save a block head as published. Returns the folder."""
    save_block_head(eagle.cfg, eagle.state_dict(), eagle.vocab, folder)
    return folder


def save_everything(folder: Path) -> Path:
    """Save a folder that generate.py can run with any method, for a vocabulary of 256 bytes, 2 special tokens and 2
    unused ids. Returns the folder. It holds the target with a tokenizer and a chat template, and in folders below

        eagle, eagle3, block, medusa   draft heads
        eagle_pickle, medusa_pickle    the same as pickles
        draft                          a draft model of one layer
        int8                           the target in int8
    """
    model, eagle = pair(0, 0.3, torch.float32, vocab_size=260)
    save_target(model, folder)
    save_head(eagle, folder / "eagle")
    save_head3(head3(model, ids=list(range(64, 123)) + [32]), folder / "eagle3")
    save_block(block(model, markov="vanilla"), folder / "block")
    save_medusa(MedusaHeads(model.cfg.hidden_size, 3, vocab_size=260), folder / "medusa")
    save_target(target(5, torch.float32, vocab_size=260, num_hidden_layers=1), folder / "draft")
    for name, file, pickle in (("eagle", "model.safetensors", "pytorch_model.bin"),
                               ("medusa", "medusa_lm_head.safetensors", "medusa_lm_head.pt")):
        copy = folder / f"{name}_pickle"
        shutil.copytree(folder / name, copy)
        torch.save(load_file(folder / name / file), copy / pickle)
        (copy / file).unlink()
    raw = config_json(model.cfg) | {"bos_token_id": 256, "eos_token_id": 257}
    quantize_linears(model, "int8")
    save_target(model, folder / "int8")
    save_file(model.state_dict(), folder / "int8/model.safetensors", {"format": FORMAT, "mode": "int8"})
    for where in (folder, folder / "draft", folder / "int8"):
        save_tokenizer(where)
    curve = {"nodes": NODES, "topk": 10, "gained": [[1, 2, 3] + [3] * 5] * 8}
    for name, value in (("config.json", raw), ("generation_config.json", {"eos_token_id": [257], "temperature": 0.6}),
                        (f"eagle/{VOCAB}", list(range(64, 123)) + [32]), (f"eagle/{CURVE}", curve)):
        (folder / name).write_text(json.dumps(value))
    return folder


def save_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer without merges: 256 bytes, <|start|> (256) and <|end|> (257), and a chat template."""
    bpe = BPE(models.BPE({CHAR_OF[i]: i for i in range(256)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|start|>", "<|end|>"])
    bpe.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}assistant: "
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def prompt(seed: int, length: int, vocab_size: int = SHAPE["vocab_size"]) -> list[int]:
    """Random token ids."""
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(model: Llama, ids: list[int]) -> Tensor:
    """The logits after every token, [len(ids), V], from a plain causal forward without a cache."""
    if model.rope is None or model.rope.shape[1] < len(ids):
        model.allocate_cache(max(len(ids), 64))
    return model.lm_head(features(model, ids))


def features(model: Llama, ids: list[int]) -> Tensor:
    """The target's hidden states after the final norm, [len(ids), C], without a cache. Needs model.rope."""
    return model(torch.tensor([ids]), torch.arange(len(ids)))[0]
