"""The draft steps of an EAGLE-1/2 head that training unrolls, and their loss. training/eagle3.py has those of EAGLE-3.

Shapes: B dialogues, R positions, N places, C hidden size, V tokens, H heads, D head size.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from draft import EagleHead
from formats.config import Config
from model import Layer
from training.attention import FusedAttention

LOGITS = 200_000_000  # at most so many are computed at a time: 0.4 GB for the head, and as much for the target


def new_head(cfg: Config, device: torch.device) -> EagleHead:
    """An untrained head for a target of this config. Its weights are small and random: at first the layer adds almost
    nothing, and fc passes on half of the feature."""
    cfg = cfg.plain(num_layers=1)
    head = EagleHead(cfg).to(device)
    for name, p in head.named_parameters():
        torch.nn.init.normal_(p, std={"layer.wqkv.weight": 0.01, "layer.w2.weight": 0.002}.get(name, 0.02))
    with torch.no_grad():
        head.layer.wo.weight.zero_()
        head.layer.mlp_norm.weight.fill_(1)
        head.fc.weight[:, cfg.hidden_size:] = 0.5 * torch.eye(cfg.hidden_size)
    return head


def unrolled(head: EagleHead, embedding: Tensor, features: Tensor, rope: Tensor, keys: list[Tensor],
             values: list[Tensor]) -> Tensor:
    """One draft step of the head for R positions at once: predicted features [B, R, C].

    embedding [B, R, C] of the tokens, features [B, R, C] of the step before, rope [2, R, D]. keys and values hold one
    entry [B, H, R, D] for each step, and get this step's. Row s of step j computes what drafting computes j steps after
    position s: it sees the first step's entries, made of true features, up to row s, and of each later step only its
    own row.
    """
    x = head.fc(torch.cat((embedding, features), dim=-1))
    x = x + head.layer.wo(unrolled_attention(head.layer, x, rope, keys, values))
    return head.layer.mlp(x)


def unrolled_attention(layer: Layer, x: Tensor, rope: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """What the heads read in one draft step, [B, R, H * D], of the layer's input x [B, R, any]: see `unrolled`."""
    q, k, v = (y.transpose(1, 2) for y in layer.qkv(x, rope))  # [B, heads, R, D]
    groups = layer.num_heads // layer.num_kv_heads
    keys.append(k.repeat_interleave(groups, 1))
    values.append(v.repeat_interleave(groups, 1))
    y, first = FusedAttention.apply(q, keys[0], values[0], None)
    later = [(q * key).sum(-1, keepdim=True).float() * layer.head_dim**-0.5 for key in keys[1:]]
    total = torch.cat((first, *later), -1).logsumexp(-1, keepdim=True)
    y = (first - total).exp() * y
    for scores, value in zip(later, values[1:]):
        y = y + (scores - total).exp() * value
    return y.to(q.dtype).transpose(1, 2).flatten(2)


def distill(lm_head: Tensor, regression: float, predicted: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
    """For each of N places: the loss [N] fp32, and whether the head's best token is the target's, [N] bool.

    lm_head [V, C]. predicted and feature [N, C]: the head's and the target's. regression: the weight of the distance
    between these two.
    """
    target = F.linear(feature, lm_head).detach().float()
    logits = F.linear(predicted, lm_head).float()
    distance = F.smooth_l1_loss(predicted.float(), feature.float(), reduction="none").mean(-1)
    return soft_cross_entropy(logits, target) + regression * distance, logits.argmax(-1) == target.argmax(-1)


def in_parts(loss_of: Callable[..., tuple[Tensor, Tensor]], tokens: int, weight: Tensor, outputs: Tensor, *rows: Tensor
             ) -> tuple[Tensor, Tensor]:
    """The sum of weight * loss over N places, 0-d, and where the best tokens agree, [N] bool. Only the logits of a part
    of the places are in memory at a time. (All, of four draft steps and 152,000 tokens, would take 20 GB.)

    loss_of(outputs, *rows) gives loss and agreement of each place, from logits of `tokens` tokens. weight [N] fp32,
    outputs and rows [N, any]. The gradients come in two steps: those of what else loss_of reads (an lm_head, a last
    norm) are added to .grad here, part by part; that of `outputs` comes with the backward pass of the sum. So the
    caller sets .grad to None before, runs that pass once, and scales nothing but `weight`.
    """
    losses, agreements, gradients = [], [], []
    size = places_in_part(len(outputs), tokens)
    for part, weights, *others in zip(*(t.split(size) for t in (outputs.detach(), weight, *rows))):
        loss, agree = loss_of(part.requires_grad_(), *others)
        loss = (loss * weights).sum()
        loss.backward()
        losses.append(loss.detach())
        agreements.append(agree)
        gradients.append(part.grad)
    zero = ((outputs - outputs.detach()) * torch.cat(gradients)).sum()  # its gradient for `outputs` is that of the sum
    return sum(losses) + zero, torch.cat(agreements)


def places_in_part(places: int, tokens: int) -> int:
    """How many of the places `in_parts` takes at a time: all, a half, a quarter and so on, filled up to whole eights,
    with at most LOGITS logits of `tokens`. So 8192 places are cut into parts of one size: the loss is compiled once."""
    parts = 2 ** (-(-places * tokens // LOGITS) - 1).bit_length()
    return -(-places // (8 * parts)) * 8


def shares(counts: Tensor) -> Tensor:
    """The weights of a mean over those of N places where `counts` [N] bool is True: [N] fp32."""
    return counts / counts.sum().clamp(min=1)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of each row of logits [N, V], with the distribution whose logits are `target` [N, V]: [N]."""
    return logits.logsumexp(-1) - (target.softmax(-1) * logits).sum(-1)


def compile_on_gpu(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


class Replay:
    """function(x), which returns tensors, as one CUDA graph: the few thousand kernels of a training step take longer to
    launch than to run. x has the same shape each time. `function` has run before, so that all is compiled. Unlike the
    graphs of ops/graphs.py it shares no memory with others: what it holds is freed with it."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> None:
        self.x = x.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function(self.x)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self.x.copy_(x)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)
