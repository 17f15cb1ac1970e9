"""Weights that others have quantised, as integers of this engine. Nothing here knows a file, only bits and numbers.

Four bits with a scale and a zero for each group of columns become int4, integer for integer: AWQ, GPTQ, the packed kind
of compressed-tensors, and Q4_0, Q4_1 and Q4_K of GGUF. Eight bits with a scale for each row become int8, number for
number. No integers of this engine hold the others (FP8, nf4, scales for each few columns of eight bits): of those the
values are rounded to int8. `Read.error` says by how much what was read has moved. The formats: quant/published.py.

Shapes: N outputs, K inputs (columns).
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ops.quantized import Quantized, dequantize, pack
from quant.linear import GROUPS, ROWS, empty_quantized, quantize_weight, rows_of, same_kind, stack


class Affine(NamedTuple):
    """w[n, k] = scale[g, n] * (q[n, k] - zero[g, n]) with g = k // group. Column k belongs to input order[k]."""
    q: Tensor  # int8 [N, K], -8 to 7; of formats with 8 bits, of which only the values are used: int8 or int16
    scale: Tensor  # fp16, bf16 or fp32 [groups, N]
    zero: Tensor  # a number from -8 to 8 in most formats [groups, N]
    group: int
    order: Tensor | None = None  # int64 [K]

    def values(self, rows: slice) -> Tensor:
        """Rows of the weight, fp32 [any, K], in the order of the inputs."""
        scale, zero = (t[:, rows].float().T.repeat_interleave(self.group, 1)[:, :self.q.shape[1]]
                       for t in (self.scale, self.zero))
        w = scale * (self.q[rows] - zero)
        return w if self.order is None else w[:, self.order.argsort()]

    def of_rows(self, rows: Tensor) -> "Affine":
        return self._replace(q=self.q[rows], scale=self.scale[:, rows], zero=self.zero[:, rows])

    def times(self, factor: float) -> "Affine":
        return self._replace(scale=self.scale.float() * factor)

    def integers(self, like: Quantized) -> Quantized:
        """The same in the layout of `like`, which int4_layout gave."""
        groups = torch.arange(len(like.scale)) * like.group  # their first columns
        live = groups < self.q.shape[1]
        at = (groups // self.group).clamp(max=len(self.scale) - 1)
        scale, zero = (torch.where(live[:, None], t.float()[at], 0) for t in (self.scale, self.zero))
        words = (scale, zero) if like.scale.dtype == torch.float16 else (scale / 16, -scale * zero)
        words = torch.stack(words, -1).to(like.scale.dtype)
        if not words.isfinite().all():
            raise ValueError("its scales are too large, or not finite: the file is damaged")
        return like._replace(data=pack(self.q), scale=words)


class Rows(NamedTuple):
    """w[n, k] = scale[n] * q[n, k]: int8 [N, K], fp32 [N]."""
    q: Tensor
    scale: Tensor

    def values(self, rows: slice) -> Tensor:
        return self.q[rows] * self.scale[rows, None]

    def of_rows(self, rows: Tensor) -> "Rows":
        return Rows(self.q[rows], self.scale[rows])

    def times(self, factor: float) -> "Rows":
        return Rows(self.q, self.scale.float() * factor)

    def integers(self, like: Quantized) -> Quantized:
        return like._replace(data=self.q.contiguous(), scale=self.scale)


class Numbers(NamedTuple):
    """A weight of which only the values are known: values(rows) gives them, fp32 [any, K]."""
    values: Callable[[slice], Tensor]

    def of_rows(self, rows: Tensor) -> "Numbers":
        def values(chosen: slice) -> Tensor:
            wanted = rows[chosen]
            first = int(wanted.min())  # all are near: rows of one head, or one of three parts
            return self.values(slice(first, int(wanted.max()) + 1))[wanted - first]

        return Numbers(values)

    def times(self, factor: float) -> "Numbers":
        return Numbers(lambda rows: self.values(rows) * factor)


class Foreign(NamedTuple):
    """A published weight [N, K] that is not read yet."""
    name: str  # of its format, for people
    shape: tuple[int, int]
    like: Quantized | None  # the layout that holds its integers, without them; None: none does
    read: Callable[[], Affine | Rows | Numbers]

    def dense(self) -> Tensor:
        """All of it, fp32 [N, K]."""
        return self.read().values(slice(None))

    def of_rows(self, rows: Tensor) -> "Foreign":
        """The weight of these of its rows, int64 [any], in this order. All of it is read for that."""
        like = None if self.like is None else rows_of(self.like, rows)
        return Foreign(self.name, (len(rows), self.shape[1]), like, lambda: self.read().of_rows(rows))

    def times(self, factor: float) -> "Foreign":
        """The weight multiplied by a number: its scales are, and may be rounded again."""
        return self._replace(read=lambda: self.read().times(factor))


class Read(NamedTuple):
    """What `read_stacked` gives: the weight; the sum of the squared changes of its numbers; the sum of their squares.
    Published weights that are kept exactly are in neither sum."""
    weight: Quantized
    moved: float
    total: float

    @property
    def error(self) -> float:
        return relative_error(self.moved, self.total)


def relative_error(moved: float, total: float) -> float:
    """By how much weights have moved: the root of the mean square, as a part of theirs."""
    return (moved / total) ** 0.5 if total else 0.0


# ----- From published integers to ours -----------------------------------------------------------------------------


def int4_layout(N: int, K: int, group: int, scale: torch.dtype, symmetric: bool, order: Tensor | None = None
                ) -> Quantized | None:
    """The layout of int4 for groups of this many columns, or None where there is none. Larger groups become several
    of 128 with the same scale. bf16 scales without zeros fit a pair of bf16; for all others it is one of fp16."""
    stored = 128 if group >= K else next((size for size in sorted(GROUPS, reverse=True) if group % size == 0), None)
    if stored is None:
        return None
    zeros = not (symmetric and scale == torch.bfloat16)
    like = empty_quantized(N, K, "int4", stored, zeros=zeros)
    return like if order is None else like._replace(order=order.int())


def stacked_layout(pieces: list[Foreign]) -> Quantized:
    """The layout of several weights, one below the other, as one: that of all of them if they have the same, otherwise
    int8."""
    found = [int8_layout(piece) if piece.like is None else piece.like for piece in pieces]
    if not all(same_kind(like, found[0]) for like in found):
        found = [int8_layout(piece) for piece in pieces]
    whole = found[0]
    for like in found[1:]:
        whole = stack(whole, like)
    return whole


def int8_layout(piece: Foreign) -> Quantized:
    return empty_quantized(*piece.shape, "int8")


def read_stacked(pieces: list[Foreign], like: Quantized) -> Read:
    """The weights, one below the other, in the layout that stacked_layout gave for them."""
    whole = None
    sums = torch.zeros(2, dtype=torch.float64)
    for piece in pieces:
        source = piece.read()
        kept = piece.like is not None and same_kind(piece.like, like)
        weight = source.integers(piece.like) if kept else round_to_int8(source, piece.shape)
        if not (kept and is_exact(source, weight)):
            sums += measure(source, weight)
        whole = weight if whole is None else stack(whole, weight)
    return Read(whole, *sums.tolist())


def round_to_int8(source: Affine | Rows | Numbers, shape: tuple[int, int]) -> Quantized:
    """int8 of the values, a few rows at a time."""
    out = empty_quantized(*shape, "int8", device="cpu")
    for first in range(0, shape[0], ROWS):
        rows = slice(first, first + ROWS)
        part = quantize_weight(source.values(rows), "int8")
        out.data[rows], out.scale[rows] = part.data, part.scale
    if not out.scale.isfinite().all():
        raise ValueError("its scales are not finite: the file is damaged")
    return out


def is_exact(source: Affine | Rows | Numbers, weight: Quantized) -> bool:
    """Whether no scale and no zero was rounded when `weight` was made of the integers of `source`."""
    if not isinstance(source, Affine):
        return isinstance(source, Rows)
    dtype = weight.scale.dtype
    numbers = (source.scale.float() / (1 if dtype == torch.float16 else 16), source.zero.float())
    return all(torch.equal(number.to(dtype).float(), number) for number in numbers)


def measure(source: Affine | Rows | Numbers, weight: Quantized) -> Tensor:
    """The sums of squares of Read, float64 [2], a few rows at a time."""
    sums = torch.zeros(2, dtype=torch.float64)
    for first in range(0, weight.shape[0], ROWS):
        rows = slice(first, first + ROWS)
        exact = source.values(rows)
        found = dequantize(rows_of(weight, rows), torch.float32)[:, :exact.shape[1]]
        sums += torch.stack(((found - exact).square().sum(dtype=torch.float64),
                             exact.square().sum(dtype=torch.float64)))
    return sums
