"""The weights of a converted model: what each published weight becomes, in the order of the file, one at a time.

Packed weights that become one fused matrix keep their integers where all of them have the same layout. If they have
not, or no layout holds them, they become int8. If one of them is not packed, the matrix is not quantised: then nothing
is lost of the one that was left alone. The embedding is never quantised here.
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from formats.hf import LazyTensor
from quant.imported import Foreign, read_stacked, relative_error, stacked_layout
from quant.linear import ROWS
from quant.published import describe

EMBEDDING = "embed"


def plain_dtype(norm: LazyTensor) -> torch.dtype:
    """The dtype for what is not quantised: float16 where the last norm is, so that nothing is lost; else bfloat16. (Not
    the embedding's: some families' is multiplied on conversion, and is fp32 then.)"""
    return torch.float16 if norm.read().dtype == torch.float16 else torch.bfloat16


class Conversion:
    """keep: packed weights keep their integers. Otherwise their values become `dtype`, as all other weights do."""

    def __init__(self, dtype: torch.dtype, keep: bool) -> None:
        self.dtype = dtype
        self.keep = keep
        self.kinds: dict[str, list[float]] = {}  # what became what: matrices, and the sums of quant.imported.Read

    def packed(self, ours: str, published: list[LazyTensor]) -> list[Foreign]:
        """The published weights that become integers under our name `ours`; [] where they do not."""
        if not self.keep or ours == f"{EMBEDDING}.weight" or any(tensor.packed is None for tensor in published):
            return []
        return [describe(tensor.packed) for tensor in published]

    def like(self, ours: str, published: list[LazyTensor], shape: torch.Size) -> dict[str, Tensor]:
        """Names, shapes and dtypes of the tensors that stand for one of our weights, on the meta device."""
        pieces = self.packed(ours, published)
        if not pieces:
            return {ours: torch.empty(shape, dtype=self.dtype, device="meta")}
        weight, module = stacked_layout(pieces), ours.removesuffix(".weight")
        found = {f"{module}.data": weight.data, f"{module}.scale": weight.scale}
        return found if weight.order is None else found | {f"{module}.order": weight.order}

    def pieces(self, ours: str, published: list[LazyTensor]) -> Iterator[Tensor]:
        """The data of these tensors, in the same order, in pieces that lie one below the other."""
        foreign = self.packed(ours, published)
        if foreign:
            like = stacked_layout(foreign)
            read = read_stacked(foreign, like)
            kind = f"int4 in groups of {like.group}" if like.group else "int8"
            self.count(" + ".join(dict.fromkeys(piece.name for piece in foreign)) + f" -> {kind}", read.moved,
                       read.total)
            yield read.weight.data
            yield read.weight.scale
            if read.weight.order is not None:
                yield read.weight.order
            return
        for tensor in published:
            if tensor.packed is None or not self.keep:
                yield tensor.read().to(self.dtype)
                continue
            piece = describe(tensor.packed)
            values = piece.read().values
            self.count(f"{piece.name} -> {str(self.dtype).removeprefix('torch.')}", 0, 0)
            for first in range(0, piece.shape[0], ROWS):
                yield values(slice(first, first + ROWS)).to(self.dtype)

    def count(self, kind: str, moved: float, total: float) -> None:
        """Add one matrix to the summary."""
        sums = self.kinds.setdefault(kind, [0, 0, 0])
        for i, value in enumerate((1, moved, total)):
            sums[i] += value

    def summary(self) -> list[str]:
        """Lines for people: what became what, and by how much it moved."""
        return [f"{kind}: {count} {'matrix' if count == 1 else 'matrices'}, "
                + (f"moved by {relative_error(moved, total):.2%}" if moved
                   else "rounded" if kind.endswith("float16") else "exactly")
                for kind, (count, moved, total) in self.kinds.items()]
