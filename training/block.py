"""Training a block drafter (drafters/block.py): what differs from an EAGLE-1/2 head (training/trainer.py).

    python train.py --checkpoint checkpoints/ORG/NAME --kind block

A dialogue is cut at random places of its answers, the anchors. Behind each, a block of rows guesses the tokens that
follow, all at once: row j (from 0) the token j + 1 after the anchor. The rows see the text before the anchor as context
entries, and each the earlier rows of its own block. The loss is the cross-entropy with the target's distribution, given
the whole text, over the draft vocabulary (forward KL, as JetSpec's). The Markov head (DSpark) is given the true token
before each.

Shapes: B dialogues, S tokens of one, A anchors of one, b rows of a block, N = B * A * b, H hidden size, k taps,
L layers, K key/value heads, D head size, V tokens, Vd draft tokens, r the Markov head's rank.
"""
import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters.block import BlockHead, Markov
from formats.block import BlockConfig, open_block, save_block
from formats.block_config import usual_outputs
from formats.config import Config
from model import Layer, Llama, apply_rope
from tokenizer import Tokenizer
from training.attention import FusedAttention, seen
from training.dialogues import Script, unmark
from training.steps import compile_on_gpu, in_parts, soft_cross_entropy
from training.tapped import (
    TappedTrainer,
    channel_scales,
    check_key_heads,
    draft_tokens,
    frequent_tokens,
    sample_hidden,
)

LAYERS = 2  # where --head_layers does not say how many
BLOCK = 8  # the same for --block_size
RANK = 128  # the same for --markov_rank
TAPS = 5  # as published heads have
ANCHORS = 128  # of a dialogue, where --anchors does not say how many

# ----- The forward and its loss ------------------------------------------------------------------------------------


def context(head: BlockHead, taps: Tensor, rope: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer the rotated keys and the values of all tokens, [B, K, S, D] each. They are made from the taps
    [B, S, k * H] times head.tap_scale [k * H]. rope [2, S, D]."""
    t = head.hidden_norm(head.fc(taps * head.tap_scale)).to(taps.dtype)
    entries = []
    for layer in head.layers:
        rows = layer.wqkv.weight[layer.num_heads * layer.head_dim:]
        k, v = F.linear(t, rows).unflatten(-1, (2, -1, layer.head_dim)).unbind(2)  # [B, S, K, D]
        entries.append((apply_rope(layer.k_norm(k).to(k.dtype), rope).transpose(1, 2), v.transpose(1, 2)))
    return entries


def block_rows(head: BlockHead, x: Tensor, rope: Tensor, anchors: Tensor, entries: list[tuple[Tensor, Tensor]]
               ) -> Tensor:
    """The rows of all blocks after the last norm, [B, A, b, H]. x [B, A, b, H]: the embedded anchors and mask tokens,
    rope [2, B, A, b, D], anchors [B, A] int64, entries from `context`."""
    place = torch.arange(entries[0][0].shape[2], device=x.device)
    before = (place < anchors[..., None]).repeat_interleave(x.shape[2], 1)  # [B, A * b, S]
    before = seen(before, head.layers[0].num_heads, entries[0][0].dtype)
    for layer, (keys, values) in zip(head.layers, entries):
        x = x + layer.wo(block_attention(layer, layer.attn_norm(x).to(x.dtype), rope, before, keys, values))
        x = layer.mlp(x)
    return head.norm(x).to(x.dtype)


def block_attention(layer: Layer, x: Tensor, rope: Tensor, before: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What the heads read, [B, A, b, heads * D], of normed rows x [B, A, b, H]: the context before the anchor, which
    `before` [B, heads, A * b, S] says as FusedAttention's bias, and the rows of the same block up to their own."""
    size, heads, key_heads = layer.head_dim, layer.num_heads, layer.num_kv_heads
    q, k, v = layer.wqkv(x).unflatten(-1, (-1, size)).split((heads, key_heads, key_heads), -2)  # [B, A, b, heads, D]
    q = apply_rope(layer.q_norm(q).to(q.dtype), rope)
    k = apply_rope(layer.k_norm(k).to(k.dtype), rope)
    q, k, v = (y.movedim(3, 1) for y in (q, k, v))  # [B, heads, A, b, D]
    k, v, keys, values = (y.repeat_interleave(heads // key_heads, 1) for y in (k, v, keys, values))
    y, in_context = FusedAttention.apply(q.flatten(2, 3), keys, values, before)
    y, in_context = y.view(q.shape), in_context.view(*q.shape[:-1], 1)
    row = torch.arange(x.shape[2], device=x.device)
    scores = (q @ k.transpose(-1, -2)).float().masked_fill(row > row[:, None], -torch.inf) * size**-0.5
    total = torch.cat((in_context, scores), -1).logsumexp(-1, keepdim=True)
    y = (in_context - total).exp() * y + (scores - total).exp().to(v.dtype) @ v
    return y.to(v.dtype).movedim(1, 3).flatten(-2)


def distill_block(markov: Markov | None, target_rows: Tensor, h: Tensor, previous: Tensor, feature: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """For each of N rows h [N, H]: the loss [N] fp32, and whether the row's best token is the target's, [N] bool.
    target_rows [Vd, H]: the target's lm_head for the draft tokens. previous [N] int64: the true token before the
    guessed one. feature [N, H]: the target's."""
    target = F.linear(feature, target_rows).detach().float()
    logits = F.linear(h, target_rows)
    if markov is not None:  # it adds nothing to the first rows, of tokens that are not in the draft vocabulary
        added = markov.w2(markov.w1(previous).to(h.dtype))
        logits = logits + F.pad(added, (logits.shape[1] - added.shape[1], 0))
    logits = logits.float()
    return soft_cross_entropy(logits, target), logits.argmax(-1) == target.argmax(-1)


# ----- A new head --------------------------------------------------------------------------------------------------


def new_config(target: Config, args: argparse.Namespace, mask_token: int) -> BlockConfig:
    """What the options ask for; other sizes are the target's. The layers are Qwen3's, as in all published heads."""
    count = args.head_layers or LAYERS
    taps = sorted({i + 1 for i in usual_outputs(min(TAPS, target.num_layers), target.num_layers)})  # few: of few layers
    layer = target.plain(num_layers=count, intermediate_size=args.mlp or target.intermediate_size, qk_norm=True,
                         num_kv_heads=args.kv_heads or target.num_kv_heads)
    rank = RANK if args.markov_rank is None else args.markov_rank
    return BlockConfig(
        layer, target.hidden_size, target.num_layers, tuple(taps),
        args.block_size or BLOCK, mask_token, anchor_first=True, causal=True, windows=(None,) * count,
        draft_vocab_size=draft_tokens(args, target), markov="vanilla" if rank else None,
        markov_rank=rank)


def unused_token(tokenizer: Tokenizer, vocab_size: int) -> int:
    """A token that texts do not contain: the last special one that neither ends a text nor is in the template."""
    script = Script(tokenizer, torch.device("cpu"))
    used = {*script.forced.flatten().tolist(), *tokenizer.stop_ids}
    special = [i for i, token in tokenizer.added.items() if token.special and i < vocab_size and i not in used]
    return max(special, default=vocab_size - 1)


@torch.no_grad()
def initialise(head: BlockHead, target: Llama) -> None:
    """Give a new head its weights. At first its layers add almost nothing, so that each row predicts what its own
    embedding says; the last norm is the target's."""
    for name, p in head.named_parameters():
        if p.ndim == 1:
            p.fill_(1)
        else:
            torch.nn.init.normal_(p, std=0.002 if "w2.weight" in name else 0.02)
    for layer in head.layers:
        layer.wo.weight.zero_()
    head.norm.weight.copy_(target.norm.weight)


# ----- The trainer -------------------------------------------------------------------------------------------------


class BlockTrainer(TappedTrainer):
    """Trains a BlockHead."""
    own_options = ("head_layers", "mlp", "kv_heads", "block_size", "markov_rank", "anchors")
    open_files = staticmethod(open_block)

    @staticmethod
    def check(args: argparse.Namespace, target: Config) -> None:
        if args.length < 2 * (args.block_size or BLOCK) + 2:
            raise ValueError(f"--length {args.length} leaves no room for a block behind some context")
        TappedTrainer.check(args, target)
        check_key_heads(args, target)

    def __init__(self, model: Llama, args: argparse.Namespace, data: Tensor, held_out: Tensor | None = None) -> None:
        super().__init__(model, args, data, held_out)
        self.context = compile_on_gpu(context, self.device)
        self.block_rows = compile_on_gpu(block_rows, self.device)
        self.distill = compile_on_gpu(distill_block, self.device)

    @property
    def by_token(self) -> tuple[str, ...]:
        return ("markov.w1.weight",) if self.module.markov else ()

    @property
    def ahead(self) -> int:
        return self.module.cfg.block_size

    def kept_rows(self, batch: int) -> tuple[int, int, int]:
        """As Trainer.kept_rows. Rows of layers: of blocks and context, twice, for gradients; of logits: of blocks."""
        rows = batch * self.anchors * self.module.cfg.block_size
        return 2, 2 * (rows + batch * self.args.length), rows

    @property
    def anchors(self) -> int:
        """How many anchors a dialogue has."""
        return min(ANCHORS if self.args.anchors is None else self.args.anchors, self.args.length - self.ahead - 2)

    @torch.no_grad()
    def make_module(self) -> BlockHead:
        args, target = self.args, self.model
        cfg = new_config(target.cfg, args, unused_token(Tokenizer(args.checkpoint), target.cfg.vocab_size))
        head = BlockHead(cfg).to(self.device)
        del head.vocab
        vocab = frequent_tokens(self.data, cfg.draft_vocab_size, target.cfg.vocab_size)
        head.register_buffer("vocab", None if vocab is None else vocab.to(self.device))
        head.register_buffer("tap_scale", channel_scales(sample_hidden(target, self.data, cfg.taps)[1]))
        initialise(head, target)
        return head

    def predict(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """As Trainer.predict: at `anchors` random places of each dialogue."""
        tokens = unmark(marked)
        of_answer = marked >= 0
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1], device=self.device)
            features, taps = self.model.forward_with_taps(tokens, positions, taps=self.taps)
            # A random number below 1, plus 1 where the token after the anchor belongs to an answer. An anchor needs
            # context, so that the first is token 1.
            end = tokens.shape[1] - self.ahead - 1
            priority = torch.rand_like(features[:, 1:end, 0].float()) + of_answer[:, 2:end + 1]
            anchors = 1 + priority.topk(self.anchors, 1).indices
        return self.block_losses(tokens, of_answer, features, taps, anchors)

    def block_losses(self, tokens: Tensor, of_answer: Tensor, features: Tensor, taps: Tensor, anchors: Tensor
                     ) -> tuple[Tensor, Tensor]:
        """The loss, 0-d, and the agreement at each row, [b] (0 to 1). tokens int64 and of_answer bool [B, S]; features
        [B, S, H] and taps [B, S, k * H] are the target's; anchors [B, A] int64."""
        head, rows = self.module, self.module.cfg.block_size
        place = anchors[..., None] + torch.arange(rows, device=self.device)  # [B, A, b], of the token before the guess
        flat = (place + tokens.shape[1] * torch.arange(len(tokens), device=self.device)[:, None, None]).flatten()
        in_answer = (of_answer.flatten()[flat + 1].view(place.shape).long().cumprod(-1) == 1).flatten()
        previous = tokens.flatten()[flat]
        known = self.known(tokens)[tokens.flatten()[flat + 1]]
        feature = features.flatten(0, 1).index_select(0, flat)
        block = torch.full_like(place, head.cfg.mask_token)
        block[..., 0] = tokens.gather(1, anchors)
        rope = self.rope[:, :tokens.shape[1]]
        learned = in_answer & known
        counts = in_answer.view(-1, rows).sum(0).clamp(min=1)
        weight = learned.view(-1, rows) * self.args.decay ** torch.arange(rows, device=self.device) / counts
        with self.amp:
            entries = self.context(head, taps, rope)
            x = self.model.embed(block)
            h = self.block_rows(head, x, self.rope[:, place], anchors, entries).flatten(0, 2)
            loss, agree = in_parts(partial(self.distill, head.markov, self.target_rows), len(self.target_rows),
                                   weight.flatten(), h, previous, feature)
        return loss, (agree & learned).view(-1, rows).sum(0) / counts

    def export(self) -> None:
        save_block(self.module.cfg, *self.published(), self.args.out)
