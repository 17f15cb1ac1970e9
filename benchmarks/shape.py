"""--shape: a checkpoint's model in the shape of a large one, and its prompts and draft weights with it.

benchmarks/widen.py says how a model gets wide without computing anything else, benchmarks/widen_eagle3.py and
benchmarks/widen_block.py the same of EAGLE-3 and block heads.
"""
import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from app.options import DTYPES
from benchmarks.widen import PADDING, SHAPES, widen_head, widen_model, write_live_columns
from benchmarks.widen_block import widen_block
from benchmarks.widen_eagle3 import widen_head3
from draft import EagleHead, Vanilla
from drafters.block import BlockHead
from drafters.eagle3 import Eagle3Head
from drafters.heads import Head
from drafters.medusa import MedusaHeads
from drafters.methods import weights_of_head
from engine import Engine
from formats.block_config import NESTED
from formats.eagle import find_head, folder_of, read_config
from formats.eagle3_config import flat, naming
from model import Llama
from quant.linear import is_quantized

QUANTISED = "--shape widens unquantised weights: quantise the result with --quantize"


def choose_kept_ids(used: set[int], vocab_size: int, size: int) -> list[int]:
    """The ids, out of `vocab_size`, that a model with only `size` ids keeps, ascending: those in use, then the lowest.
    The lowest are special tokens, bytes and the earliest merges, so the most frequent."""
    if len(used) > size:
        raise ValueError(f"prompts and answers use {len(used)} different ids, the shape has {size}: fewer --questions")
    unused = (i for i in range(vocab_size) if i not in used)
    return sorted(used | {i for i, _ in zip(unused, range(size - len(used)))})


def mask_tokens(args: argparse.Namespace, vocab_size: int) -> set[int]:
    """The mask token of the block head that --draft names, or of the checkpoint's. No text contains it, and the head
    needs its embedding. Empty where there is no such head."""
    folder = folder_of(args.draft or find_head(args.checkpoint, BlockHead.folder))
    raw = read_config(folder)
    with naming(folder / "config.json"):
        token = flat(raw, NESTED).get("mask_token_id") if raw else None
    return {token} if type(token) is int and 0 <= token < vocab_size else set()


class Widening:
    """--shape: the checkpoint's model in fp32 (`small`), the wide one (`model`), and how prompts and draft weights get
    from one to the other. Draft weights are loaded for `small`, without --quantize, and then widened by `head`,
    `head3`, `block`, `medusa` or `draft_model`."""

    def __init__(self, args: argparse.Namespace, small: Llama, prompts: list[list[int]], stop_ids: frozenset[int]
                 ) -> None:
        if is_quantized(small):
            raise ValueError(QUANTISED)
        self.small = small
        self.shape = SHAPES[args.shape]
        self.device, self.dtype = args.device, DTYPES[args.dtype]
        self.generator = torch.Generator(args.device).manual_seed(0)  # of the noise
        self.quantize = (args.quantize, args.group or 128) if args.quantize else None
        self.of_head = weights_of_head(args, args.device)
        vocab_size = small.cfg.vocab_size
        used = {*stop_ids, *(i for ids in prompts for i in ids), *mask_tokens(args, vocab_size)}
        if self.shape["vocab_size"] < vocab_size:  # the answers must not lose their ids: write them to see which
            slots = max(map(len, prompts)) + args.max_new_tokens
            engine = Engine(small, Vanilla(args.device), slots, stop_ids)
            for ids in prompts:
                used.update(*engine.generate(ids, args.max_new_tokens))
        self.kept_ids = choose_kept_ids(used, vocab_size, self.shape["vocab_size"])
        self.wide_ids = {small_id: i for i, small_id in enumerate(self.kept_ids)}
        self.model = widen_model(small, self.shape, self.kept_ids, self.device, self.dtype, self.generator,
                                 self.quantize)
        small.free_cache()

    def ids(self, small_ids: list[int]) -> list[int]:
        return [self.wide_ids[i] for i in small_ids]

    def head(self, small: EagleHead) -> EagleHead:
        if small.of_embedding is not None:
            raise ValueError(QUANTISED)
        head = widen_head(small, self.shape, self.device, self.dtype, self.generator)
        if small.vocab is not None:
            drafted = [self.wide_ids[i] for i in small.vocab.tolist() if i in self.wide_ids]
            head.vocab = torch.tensor(drafted, device=self.device)
        return self.quantized(head)

    def head3(self, small: Eagle3Head) -> Eagle3Head:
        return self.quantized(widen_head3(small, self.small.cfg, self.shape, self.kept_ids, self.device, self.dtype,
                                          self.generator))

    def block(self, small: BlockHead) -> BlockHead:
        return self.quantized(widen_block(small, self.small.cfg, self.shape, self.kept_ids, self.device, self.dtype,
                                          self.generator))

    def quantized(self, head: Head) -> Head:
        if self.of_head.takes(head):
            head.quantize(self.of_head.mode)
        return head

    def medusa(self, small: MedusaHeads) -> MedusaHeads:
        """Their blocks leave the dead channels of a feature at zero and its constant channel unchanged."""
        layers, count, size, _ = small.weight.shape
        wide = self.shape["hidden_size"]
        kept = len(self.kept_ids)
        has_projections = small.projections is not None
        with torch.device("meta"):
            heads = MedusaHeads(wide, count, layers, self.shape["vocab_size"] if has_projections else None)
        tensors = {name: torch.normal(0.0, 0.02, t.shape, generator=self.generator, device=self.device,
                                      dtype=self.dtype) for name, t in heads.named_parameters()}
        write_live_columns(tensors["weight"], slice(None), F.pad(small.weight, (0, 0, 0, wide - size)))
        tensors["bias"] = F.pad(small.bias, (0, wide - size)).to(self.dtype)
        if has_projections:
            real, padding = tensors["projections"][:, :kept], tensors["projections"][:, kept:]
            write_live_columns(real, slice(None), small.projections[:, self.kept_ids])
            write_live_columns(padding, slice(None), small.projections.mean(1, True), PADDING)
        heads.load_state_dict(tensors, assign=True)
        return heads.requires_grad_(False)

    def draft_model(self, small: Llama) -> Llama:
        """A draft model keeps its size and gets the wide model's ids. Padding ids are copies of the first id: at a tie
        the first one wins, so padding is never drafted."""
        rows = self.kept_ids + self.kept_ids[:1] * (self.shape["vocab_size"] - len(self.kept_ids))
        embed, lm_head = (module.weight.detach()[rows] for module in (small.embed, small.lm_head))
        small.embed = nn.Embedding.from_pretrained(embed)
        small.lm_head = nn.Linear(1, 1, bias=False)
        small.lm_head.weight = nn.Parameter(lm_head, False)
        small.cfg = replace(small.cfg, vocab_size=len(rows))
        return small.to(self.dtype)
