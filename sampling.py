"""From logits to tokens: temperature, top-k, top-p, min-p, and noise that is keyed by the position in the text.

Every function has static shapes, as in tree.py, and runs on a CPU, on a GPU and inside a CUDA graph.

Lossless sampling: argmax(logits / temperature + Gumbel noise) is a sample of softmax(logits / temperature). Our noise
is a hash of (seed, position, token) alone. So the token chosen at a position does not depend on how many drafts were
verified beside it: for one seed, sampled text is the same with and without drafting (the idea: arXiv 2408.07978).
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from ops import tree as tree_kernels


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. The same seed gives the same
    text with any drafter without rejection_sampling. ValueError for other values; it begins with the field's name."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, range_of_it in (
                # Below 1e-6, logits / temperature may overflow fp32. Above 1e6, the noise would swamp the logits.
                ("temperature", self.temperature == 0 or 1e-6 <= self.temperature <= 1e6, "0, or 0.000001 to 1000000"),
                ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 or more"),
                ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
                ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
                ("seed", isinstance(self.seed, int) and -2**63 <= self.seed < 2**64, "an integer of 64 bits")):
            if not fits:
                raise ValueError(f"{name} must be {range_of_it}, not {getattr(self, name)!r}")
        object.__setattr__(self, "seed", (self.seed + 2**63) % 2**64 - 2**63)  # as the int64 of the same bits
        if self.top_k == 1 or self.min_p == 1:  # only the best token is left: greedy, with drafts without noise
            object.__setattr__(self, "temperature", 0.0)


def process(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """The logits of the distribution to sample from: logits [T, V] -> fp32 [T, V], excluded tokens -inf.

    Order and meaning are those of transformers' logits warpers: temperature, top-k, top-p, min-p. Off: 0, 1, 0."""
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(stable=True)  # ascending, as transformers sorts: ties go the same way
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    if min_p:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -torch.inf)
    return logits


def perturb(logits: Tensor, noise: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0,
            min_p: float = 0.0) -> Tensor:
    """What to take the argmax of, to sample after each row: logits [T, V] -> [T, V].

    noise [T, V] fp32 is the temperature times `gumbel_noise`: adding it to the raw logits ranks tokens as adding the
    plain noise to logits / temperature does, and a drafter can add it to its own logits too."""
    if top_k or top_p < 1 or min_p:
        logits = temperature * process(logits, temperature, top_k, top_p, min_p)
    return logits + noise


def gumbel_noise(seed: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Gumbel(0, 1) noise of seed (0-d int64), position ([N] int64) and token alone: [N, V] fp32."""
    if positions.is_cuda:
        return tree_kernels.gumbel_noise(seed, positions, vocab_size)
    token = torch.arange(vocab_size, device=positions.device)
    key = mix32(mix32(seed & 0xFFFFFFFF) ^ mix32((seed >> 32) & 0xFFFFFFFF ^ 0x5BD1E995))
    key = mix32(key + positions)[:, None]  # [N, 1]
    word = mix32(mix32(key ^ token))  # [N, V]
    # -log(-log(1 - u)), so that the winners have u near 0: there fp32 resolves u to 2^-32, near 1 only to 2^-24.
    # u is never 1: a loser at -inf would tie with the excluded tokens.
    u = ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def mix32(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, held in int64, that mixes every bit into all others (Chris Wellons' lowbias32)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
