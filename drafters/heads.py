"""Loading a draft head of any kind: the tensors tell which kind it is, never the names of files or folders."""
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from draft import Drafter, Eagle2, EagleHead
from drafters.block import Block, BlockHead
from drafters.eagle3 import Eagle3Head
from formats.block import open_block
from formats.config import Config
from formats.eagle import VOCAB, folder_of, native_names, open_head, read_config, read_vocab
from formats.eagle3 import open_eagle3
from formats.foreign import kind_of_head
from formats.weights import fill
from model import Llama
from ops.quantized import Quantized
from ops.startup import part
from quant.linear import stored_mode

Head = EagleHead | Eagle3Head | BlockHead
LARGE = 2**24  # weights of a head from which on a level takes a GPU the time to read them, not to launch its kernels
KINDS = {"an EAGLE-3 head": Eagle3Head, "a block head": BlockHead}  # by formats.foreign.kind_of_head; else an EagleHead


class Quantize(NamedTuple):
    """How to quantise a head that is stored unquantised; without a mode, not at all."""
    mode: str | None = None
    group: int = 128
    least: int = 0  # a head of fewer weights stays as it is

    def takes(self, head: Head) -> bool:
        """Whether it does anything with this head, which may be on the meta device."""
        own = sum(part.weight.numel() for part in head.modules() if isinstance(part, nn.Linear))
        return self.mode is not None and own >= self.least


def load_head(path: Path | str, target: Llama, vocab: int | None = None, quantize: Quantize = Quantize()) -> Head:
    """Load a head as published: a folder with config.json and model.safetensors or pytorch_model.bin, or one
    file of such a folder, for example what quantize.py writes.

    vocab: draft only so many of the most frequent tokens, which draft_vocab.json beside the weights lists (train.py
    makes it), and the prompt's own; None: all that it lists, 0: every token. A head with a draft vocabulary of its own
    drafts from all of it.
    quantize: what to convert it to while loading. A head that is stored quantised stays in its own mode.
    An EAGLE-3 or block head has `doubts`: the fields that its files leave open, for which the likeliest values are
    taken.
    Raises FileNotFoundError, or ValueError where the head is damaged, of another kind, or made for another model.
    """
    path = Path(path)
    load = {EagleHead: load_eagle, Eagle3Head: load_eagle3, BlockHead: load_block}[type_of_head(path)]
    head = load(path, target, quantize)
    file = folder_of(path) / VOCAB
    if head.vocab is not None:
        if vocab:
            raise ValueError(f"{path}: this head has a draft vocabulary of its own, so --draft_vocab cannot choose one")
    elif vocab != 0 and (vocab or file.is_file()):
        listed = read_vocab(file, target.cfg.vocab_size, vocab).to(target.embed.weight.device)
        head.vocab = listed if len(listed) < target.cfg.vocab_size else None
    return head


def type_of_head(path: Path) -> type[Head]:
    """What kind of head this is. Raises as `load_head` where it is none of them."""
    tensors = open_head(path, "EAGLE-1/2", "EAGLE-3", "block")[1]
    return KINDS.get(kind_of_head(tensors, read_config(folder_of(path))), EagleHead)


@part("draft head")
def tree_drafter(head: Head, target: Llama, nodes: int, levels: int, topk: int, retrieval=None) -> Drafter:
    """The dynamic tree of a head of any kind. A block head drafts all of its levels, which cost what one costs."""
    if isinstance(head, BlockHead):
        return Block(head, target, nodes, topk, retrieval)
    return Eagle2(head, target, nodes, levels, topk, retrieval)


def load_eagle(path: Path, target: Llama, quantize: Quantize) -> EagleHead:
    """An EAGLE-1/2 head. The tensors decide whether there are biases, since configs have been wrong; a copy of the
    target's embedding is ignored."""
    folder, weight = folder_of(path), target.embed.weight
    file, published, metadata = open_head(path, "EAGLE-1/2")
    cfg = Config.load(folder, model_type="llama")
    mode, stored_group = stored_mode(file, metadata, None)
    if cfg.hidden_size != target.cfg.hidden_size or cfg.vocab_size != target.cfg.vocab_size or (
            "embed_tokens.weight" in published and published["embed_tokens.weight"].shape != weight.shape):
        raise ValueError(f"{folder}: a head for hidden size {cfg.hidden_size} and {cfg.vocab_size} tokens, but the "
                         f"target has {target.cfg.hidden_size} and {target.cfg.vocab_size}: another model's")
    tensors = native_names(published, file)
    with torch.device("meta"):
        head = EagleHead(cfg, fc_bias="fc.bias" in tensors, qkv_bias="layer.wqkv.bias" in tensors)
    return filled(head, tensors, file, target, mode, stored_group, quantize)


def load_eagle3(path: Path, target: Llama, quantize: Quantize) -> Eagle3Head:
    """An EAGLE-3 head, with the fields that were measured when it was converted."""
    found = open_eagle3(path, target.cfg)
    mode, stored_group = stored_mode(found.file, found.metadata, None)
    with torch.device("meta"):
        head = Eagle3Head(found.config, found.tensors)
    head = filled(head, found.tensors, found.file, target, mode, stored_group, quantize)
    of_target = head.lm_head is None and found.ids is not None and len(found.ids) == target.cfg.vocab_size
    head.vocab = None if found.ids is None or of_target else found.ids.to(target.embed.weight.device)
    head.doubts = tuple(found.doubts)
    return head


def load_block(path: Path, target: Llama, quantize: Quantize) -> BlockHead:
    """A block head. Some publishers add copies of the target's embedding and lm_head: these are dropped."""
    found = open_block(path, target.cfg)
    mode, stored_group = stored_mode(found.file, found.metadata, None)
    tensors = found.tensors
    for name, of_target in (("embed.weight", target.embed.weight), ("lm_head.weight", target.lm_head.weight)):
        if name in tensors and is_copy(tensors[name], of_target):
            del tensors[name]
    with torch.device("meta"):
        head = BlockHead(found.config, tensors)
    head = filled(head, tensors, found.file, target, mode, stored_group, quantize)
    head.vocab = None if found.ids is None else found.ids.to(target.embed.weight.device)
    head.doubts = tuple(found.doubts)
    return head


def is_copy(published: Tensor, of_target: Tensor | Quantized) -> bool:
    """Whether a tensor of a head is the target's own. On the meta device nobody knows: False."""
    if isinstance(of_target, Quantized) or of_target.is_meta or published.shape != of_target.shape:
        return False
    return torch.equal(published.to(of_target.device, of_target.dtype), of_target)


def filled(head: Head, tensors: dict, file: Path, target: Llama, mode: str | None, stored_group: int,
           quantize: Quantize) -> Head:
    """The head with its weights, on the target's device. mode, stored_group: how the file is quantised; quantize: how
    it is to be if it is not."""
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    on_load = mode is None and quantize.takes(head)
    if mode:
        head.quantize(mode, stored_group)
    fill(head, tensors, file, *(("cpu", None) if on_load else (device, dtype)))
    if on_load:
        head.quantize(quantize.mode, quantize.group, device)
        head.to(device, dtype)
    return head
