"""From logits to tokens: temperature and its kin, and noise that belongs to the place in the text.

Functions of static shape, as in tree.py: they run unchanged on a CPU, on a GPU and inside a CUDA graph.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ops import tree as tree_kernels


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. The same seed gives the same text,
    whatever the drafter."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


def process(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """logits [T, V] -> fp32 logits of the distribution to sample from; excluded tokens are -inf.
    Order and meaning of transformers' warpers: temperature, top-k, top-p, min-p. Off: 0, 1 and 0."""
    logits = logits.float() / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(stable=True)  # ascending, as transformers sorts: ties go the same way
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def gumbel_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise [N, V] fp32 that depends on (seed, position, token) alone. seed 0-d, positions [N].

    argmax(logits + noise) samples the softmax. Because the noise belongs to the place in the text, not to the
    call, the token chosen there is the same however many drafts were verified along with it: for one seed,
    sampled text is the same with and without speculation (the idea: arXiv 2408.07978).
    """
    if positions.is_cuda:
        return tree_kernels.gumbel_noise(seed, positions, vocab_size)
    token = torch.arange(vocab_size, device=positions.device)
    h = mix32(mix32(seed & 0xFFFFFFFF) ^ mix32((seed >> 32) & 0xFFFFFFFF ^ 0x5BD1E995))
    h = mix32(h + positions)[:, None]  # [N, 1]
    h = mix32(mix32(h ^ token))  # [N, V]
    # -log(-log(1 - u)) with u near 0 for the winners: fp32 resolves u to 2^-32 there, and only 2^-24 near 1
    u = ((h.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # never 1: an infinite loser ties with the excluded
    return -torch.log(-torch.log1p(-u))


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words that avalanches (constants of Chris Wellons' lowbias32), held in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def perturb(logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0) -> Tensor:
    """What to take the argmax of for a sample after each row of logits [T, V]. noise [T, V]: the temperature times
    `gumbel_noise`."""
    if top_k or top_p < 1 or min_p:
        logits = temperature * process(logits, temperature, top_k, top_p, min_p)
    return logits + noise
