"""Training an EAGLE-3 head (arXiv 2503.01840): what differs from an EAGLE-1/2 head (training/trainer.py).

    python train.py --checkpoint checkpoints/ORG/NAME --kind eagle3

The head drafts from taps, the target's residual stream at three depths, and has an lm_head of its own over a draft
vocabulary: the tokens that the target writes most often in its answers. With --share_lm_head these are the target's
rows, which are neither trained nor saved, and a step has rows for the other tokens of its dialogues too, as drafting
has for a prompt's (quant/draft_rows.py). The loss is the cross-entropy with the target's distribution over all these
tokens, at every unrolled step (section 3 of the paper, "training-time test"). Where the text goes on with another
token, nothing is learned.

Shapes: B dialogues, R positions, N places, H the head's width, C the target's, k taps, V tokens, Vd draft tokens.
"""
import argparse
from collections.abc import Collection
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.eagle3 import PLAIN, Eagle3Head, Eagle3Layer
from drafters.heads import load_head
from formats.config import Config
from formats.eagle3 import open_eagle3, save_eagle3
from formats.eagle3_config import Eagle3Config, usual_taps
from model import Llama
from quant.linear import drafting_rows
from training.steps import compile_on_gpu, in_parts, shares, soft_cross_entropy, unrolled_attention
from training.tapped import (
    TappedTrainer,
    channel_scales,
    check_key_heads,
    draft_tokens,
    frequent_tokens,
    sample_hidden,
)

OWN_SCORE = 8.0  # of a new head's rows with themselves: exp(8) outweighs some hundred rows of score 0

# ----- A new head --------------------------------------------------------------------------------------------------


def choose_taps(num_layers: int) -> tuple[int, int, int]:
    """The three taps (Llama.forward_with_taps): the usual ones from 7 layers on, else embeddings, middle and end. The
    first is never 1: SGLang reads that in another way. ValueError for a target of one layer."""
    if num_layers < 2:
        raise ValueError(f"EAGLE-3 taps three depths, and this target has {num_layers} layer: train --kind eagle")
    return usual_taps(num_layers) if num_layers >= 7 else (0, num_layers // 2, max(num_layers - 1, 2))


def new_config(target: Config, args: argparse.Namespace) -> Eagle3Config:
    """What --head_layers, --mlp, --kv_heads, --norms and --draft_vocab ask for; other sizes are the target's. The first
    layer reads embedding and feature, further ones are ordinary layers, as vLLM and SGLang expect."""
    count = args.head_layers or 1
    layer = target.plain(num_layers=count, intermediate_size=args.mlp or target.intermediate_size,
                         num_kv_heads=args.kv_heads or target.num_kv_heads)
    return Eagle3Config(
        layer, target.hidden_size, target.num_layers, choose_taps(target.num_layers), (True,) + (False,) * (count - 1),
        draft_tokens(args, target), norm_before_residual=False,
        norm_output=bool(args.norms))


def initialise(head: Eagle3Head, target: Llama, embedded: Tensor, inputs: Tensor) -> None:
    """Give a new head its weights. At first its layers add almost nothing, fc passes on the top tap, and the last norm
    and the lm_head are the target's: so h has the meaning that the target's own hidden states have.

    Of a few texts: the embedded tokens [T, C], and inputs [T, k * C], what fc reads of them before head.tap_scale.
    """
    for name, p in head.named_parameters():
        if p.ndim == 1:
            p.fill_(1)
        else:
            torch.nn.init.normal_(p, std=0.01 if "wqkv" in name else 0.002 if "w2" in name else 0.02)
    first, size = head.layers[0], head.cfg.target_size
    top = inputs[:, -size:]
    final = target.norm.weight.float()
    typical = top.square().mean(-1).sqrt().median()
    if head.cfg.norm_output:  # what is fed on has gone through the norm. The first step's feature should be alike
        passed = final / typical
        feature = top * passed
        head.norm.weight.fill_(feature.square().mean(-1).sqrt().median())
    else:
        passed = torch.ones_like(final) / typical
        feature = top * passed
        head.norm.weight.copy_(final)
    head.fc.weight.zero_()
    head.fc.weight[:, -size:] = (passed / head.tap_scale[-size:]).diag()
    for layer in head.layers:
        layer.wo.weight.zero_()
    embedded = F.rms_norm(embedded, (size,))
    normed = F.rms_norm(feature, (size,))
    first.embed_norm.weight.copy_(channel_scales(embedded))
    first.feature_norm.weight.copy_(channel_scales(normed))
    first.mlp_norm.weight.copy_(channel_scales(normed))
    attend_to_own_row(first, embedded * first.embed_norm.weight)
    if head.lm_head is not None:
        head.lm_head.weight.copy_(drafting_rows(target.lm_head.weight, head.vocab, False))


def attend_to_own_row(layer: Eagle3Layer, embedded: Tensor) -> None:
    """Let every second key head attend to its own row at first: queries and keys are the same projection of the
    embedding, whose product with itself is larger than that with others, and RoPE turns both alike. The embedding
    reaches h through attention alone, so without this the newest token is not seen until queries and keys are trained.

    embedded [T, H]: what the layer reads of the tokens of a few texts.
    """
    heads, key_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    of_embedding = layer.wqkv.weight[:, :embedded.shape[1]].unflatten(0, (-1, size))  # [heads + 2 key_heads, D, H]
    group = heads // key_heads  # queries that read one key
    for i in range(0, key_heads, 2):
        key = torch.randn(size, embedded.shape[1], device=embedded.device)
        score = (embedded @ key.T).square().sum(-1).mean() / size**0.5
        key *= (OWN_SCORE / score).sqrt()
        of_embedding[i * group:(i + 1) * group] = key
        of_embedding[heads + i] = key


# ----- The draft steps and their loss --------------------------------------------------------------------------------


def fc_inputs(head: Eagle3Head, taps: Tensor) -> Tensor:
    """The taps [..., k * C], each normed if the head has norms for them."""
    if not head.fc_norms:
        return taps
    parts = taps.chunk(len(head.fc_norms), -1)
    return torch.cat([norm(part) for norm, part in zip(head.fc_norms, parts)], -1)


def join(head: Eagle3Head, taps: Tensor) -> Tensor:
    """What the first step reads, [..., H], of the taps [..., k * C]: Eagle3Head.join with head.tap_scale apart."""
    return head.fc(fc_inputs(head, taps) * head.tap_scale)


def unrolled3(head: Eagle3Head, embedding: Tensor, h: Tensor, rope: Tensor, keys: list[list[Tensor]],
              values: list[list[Tensor]]) -> Tensor:
    """One draft step of the head for R positions at once: its inputs at the next step [B, R, H], which are
    h, normed if the head has norm_output. As training.steps.unrolled, with lists of keys and values for each layer.

    embedding [B, R, H] of the tokens, h [B, R, H] from the step before or from the taps, rope [2, R, D].
    On a GPU autocast makes norms fp32, where drafting rounds them to bf16.
    """
    for layer, layer_keys, layer_values in zip(head.layers, keys, values):
        x = residual = h
        if layer.wide:
            feature = layer.feature_norm(h).to(h.dtype)
            x = torch.cat((layer.embed_norm(embedding), feature), -1)
            residual = feature if head.cfg.norm_before_residual else h
        h = layer.mlp(residual + layer.wo(unrolled_attention(layer, x, rope, layer_keys, layer_values)))
    return head.norm(h).to(h.dtype) if head.cfg.norm_output else h


def distill3(head: Eagle3Head, target_rows: Tensor, h: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """For each of N places: the loss [N] fp32, and whether the best token is the target's, [N] bool.

    target_rows [Vd, C]: the target's lm_head for the draft tokens. h [N, H] is unrolled3's, feature [N, C] the
    target's."""
    target = F.linear(feature, target_rows).detach().float()
    rows = target_rows if head.lm_head is None else head.lm_head.weight
    logits = F.linear(h if head.cfg.norm_output else head.norm(h), rows).float()
    return soft_cross_entropy(logits, target), logits.argmax(-1) == target.argmax(-1)


# ----- The trainer -------------------------------------------------------------------------------------------------


class Eagle3Trainer(TappedTrainer):
    """Trains an Eagle3Head."""
    own_options = ("head_layers", "norms", "mlp", "kv_heads", "share_lm_head", "init")
    open_files = staticmethod(open_eagle3)

    def __init__(self, model: Llama, args: argparse.Namespace, data: Tensor, held_out: Tensor | None = None) -> None:
        super().__init__(model, args, data, held_out)
        self.join = compile_on_gpu(join, self.device)
        self.unrolled = compile_on_gpu(unrolled3, self.device)
        self.distill = compile_on_gpu(distill3, self.device)

    @staticmethod
    def check(args: argparse.Namespace, target: Config) -> None:
        TappedTrainer.check(args, target)
        if args.init is None:
            choose_taps(target.num_layers)
            check_key_heads(args, target)
            return
        found = open_eagle3(args.init, target)
        check_trainable(args.init, found.tensors)
        cfg = found.config
        own = {"head_layers": cfg.layer.num_layers, "mlp": cfg.layer.intermediate_size,
               "kv_heads": cfg.layer.num_kv_heads,
               "norms": cfg.norm_output and "fc_norms.0.weight" in found.tensors,
               "share_lm_head": "lm_head.weight" not in found.tensors, "draft_vocab": cfg.draft_vocab_size}
        for name, value in own.items():
            if getattr(args, name) not in (None, value):
                raise ValueError(f"--{name} {getattr(args, name)}: the head in {args.init} has {value}; leave it out")

    @property
    def by_token(self) -> tuple[str, ...]:
        """The rows of the head's own lm_head. They begin as the target's. A step of Muon would move all directions
        equally far, also those of tokens that hardly occur; AdamW, at a twentieth of the rate, keeps near what is
        known."""
        return () if self.module.lm_head is None else ("lm_head.weight",)

    @torch.no_grad()
    def make_module(self) -> Eagle3Head:
        args, target = self.args, self.model
        if args.init:
            head = trainable(args.init, target)
            vocab = head.vocab
        else:
            cfg = new_config(target.cfg, args)
            norms = [f"fc_norms.{i}.weight" for i in range(len(cfg.taps))] if args.norms else []
            parts = [name for name in PLAIN if name != "lm_head.weight" or not args.share_lm_head]
            head = Eagle3Head(cfg, (*parts, *norms)).to(self.device)
            vocab = frequent_tokens(self.data, cfg.draft_vocab_size, target.cfg.vocab_size)
            for norm in head.fc_norms:
                torch.nn.init.ones_(norm.weight)
        del head.vocab
        head.register_buffer("vocab", None if vocab is None else vocab.to(self.device))
        embedded, taps = sample_hidden(target, self.data, head.cfg.taps)
        inputs = fc_inputs(head, taps)
        head.register_buffer("tap_scale", channel_scales(inputs))
        if args.init:
            head.fc.weight /= head.tap_scale
        else:
            initialise(head, target, embedded, inputs)
        return head

    def export(self) -> None:
        save_eagle3(self.module.cfg, *self.published(), self.args.out)

    def losses(self, tokens: Tensor, of_answer: Tensor, features: Tensor, taps: Tensor, places: Tensor
               ) -> tuple[Tensor, list[Tensor]]:
        rows = self.rows(tokens)
        head = self.module
        keys = [[] for _ in head.layers]
        values = [[] for _ in head.layers]
        known = self.known(tokens)[tokens]
        total = 0.0
        agreements = []

        def at_places(x: Tensor, first: int) -> Tensor:
            return x[:, first:first + rows].flatten(0, 1).index_select(0, places)

        with self.amp:
            h = self.join(head, taps[:, :rows])
        for j in range(1, self.ahead + 1):  # row s predicts what follows feature s + j, as in Trainer.losses
            with self.amp:
                embedding = self.model.embed(tokens[:, j:j + rows])
                rope = self.rope[:, j - 1:j - 1 + rows]
                h = self.unrolled(head, embedding, h, rope, keys, values)
                answers = at_places(of_answer, j + 1)
                learned = answers & at_places(known, j + 1)  # nothing of other tokens, where the head disagrees
                loss, agree = in_parts(partial(self.distill, head, self.target_rows), len(self.target_rows),
                                       self.args.decay ** (j - 1) * shares(learned),
                                       at_places(h, 0), at_places(features, j))
            total = total + loss
            agreements.append(((agree & learned) * shares(answers)).sum())
        return total, agreements


def trainable(path: Path, target: Llama) -> Eagle3Head:
    """The head in this folder with fp32 weights that can be trained. ValueError if it has parts that no head trained
    here has."""
    head = load_head(path, target, 0)
    check_trainable(path, head.state_dict())
    return head.float().train().requires_grad_(True)


def check_trainable(path: Path, names: Collection[str]) -> None:
    """Raise ValueError if the head in this folder, whose tensors have these names, has parts that no head trained here
    has."""
    odd = {"no fc": not any(name.startswith("fc.") for name in names), "no last norm": "norm.weight" not in names,
           "quantised weights": any(name.endswith(".data") for name in names),
           "one norm for all taps": "input_norm.weight" in names, "an embedding of its own": "embed.weight" in names}
    if any(odd.values()):
        raise ValueError(f"{path}: a head that has {' and '.join(what for what in odd if odd[what])} cannot be trained "
                         "on here")
