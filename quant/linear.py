"""Quantising weights, and the linear layer that holds the integers. ops/quantized.py says what the integers mean.

int8 needs no choice: the largest value of a row becomes 127. int4 chooses twice. A smaller range for a group of columns
clips its outliers and can halve the error of all other weights. And the error made in one column can be undone in the
columns that follow, as far as the layer's inputs are correlated (GPTQ, arXiv 2210.17323). GPTQ needs the inputs, as
the Hessian (mean of x.T @ x) that quantize.py collects; the search of ranges uses it too. Without one, the search takes
all columns as equally important, and each weight gets the nearest integer (quant/int4.py).

In a group with many zeros a zero stays exactly zero: neurons that benchmarks/widen.py adds must do nothing.
"""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ops import cpu_kernels
from ops.linear import linear
from ops.quantized import ROTATION, TILE, Quantized, dequantize, in_rows, pack, rotate, rows_of_data, to_tiles
from quant.int4 import SHRINK, column_importance, gptq, nearest_integers, search_scales

MODES = ("int8", "int8dyn", "int4")
IMPORTED = "imported"  # the mode of a file whose weights are of several kinds, as others have quantised them
GROUPS = (32, 64, 128)  # columns of int4 that share a scale and an offset
ROWS = 4096  # rows quantised at a time: this bounds the fp32 memory needed beside the weights
CACHED = 2**20  # int8 on a CPU: weights quantised at a time, few enough that their fp32 copy stays in the CPU's cache


# ----- Weights -----------------------------------------------------------------------------------------------------


def empty_quantized(N: int, K: int, mode: str, group: int = 128, device: torch.device | str = "meta",
                    zeros: bool = False) -> Quantized:
    """An uninitialised Quantized for a weight [N, K]; shapes: ops.quantized.Quantized. zeros (int4): pairs of scale and
    zero in fp16, not of scale and offset in bf16. Raises ValueError for an unknown mode or group."""
    if mode not in MODES:
        raise ValueError(f"quantisation {mode!r} is not known: there is {', '.join(MODES)}")
    if mode != "int4":
        rotated = mode == "int8dyn" and K % ROTATION == 0
        data = torch.empty(N, K, dtype=torch.int8, device=device)
        return Quantized(data, torch.empty(N, device=device), 0, 1 if mode == "int8dyn" else 2, rotated)
    if group not in GROUPS:
        raise ValueError(f"int4 in groups of {group} is not implemented: use {', '.join(map(str, GROUPS))}")
    bytes_per_row = -(-K // 256) * 128  # two columns a byte, K rounded up to a multiple of 256
    data = torch.empty(N, bytes_per_row, dtype=torch.int8, device=device)
    scale = torch.empty(2 * bytes_per_row // group, N, 2, dtype=torch.float16 if zeros else torch.bfloat16,
                        device=device)
    return Quantized(data, scale, group, 2)


def quantize_weight(w: Tensor, mode: str, group: int = 128, hessian: Tensor | None = None,
                    shrink: Sequence[float] = SHRINK) -> Quantized:
    """Quantise w [N, K] of any dtype, on its own device. A weight on the meta device gives shapes and dtypes only.

    hessian [K, K] fp32, the mean of x.T @ x over the layer's inputs: int4 then searches scales for these inputs and
    uses GPTQ. Without it int4 searches scales alone, and shrink=(1,) makes that plain round-to-nearest.
    """
    out = empty_quantized(*w.shape, mode, group, w.device)
    if w.is_meta:
        return out
    importance = None if hessian is None else column_importance(hessian)
    count = max(1, CACHED // w.shape[1]) if mode != "int4" and w.device.type == "cpu" else ROWS
    for first in range(0, len(w), count):
        rows = slice(first, first + count)
        part = w[rows].float()
        if mode == "int4":
            scale, offset = search_scales(part, group, importance, shrink)
            out.scale[:len(scale), rows] = torch.stack((scale / 16, offset), -1).bfloat16()
            out.scale[len(scale):, rows] = 0  # groups of padding
            if hessian is None:
                out.data[rows] = pack(nearest_integers(part, scale, offset, group))
        else:
            part = rotate(part) if out.rotated else part
            out.scale[rows] = part.abs().amax(1) / 127
            out.data[rows] = (part / out.scale[rows, None].clamp(min=1e-30)).round_()
    if hessian is not None and mode == "int4":
        scale, offset = out.scale.float().unbind(-1)
        out.data.copy_(pack(gptq(w.float(), scale * 16, offset, group, hessian)))
    return out


def rows_of(weight: Tensor | Quantized, rows: Tensor | slice) -> Tensor | Quantized:
    """The given rows (outputs) of a weight: ids or a slice."""
    if not isinstance(weight, Quantized):
        return weight[rows]
    scale = weight.scale[:, rows].contiguous() if weight.group else weight.scale[rows]  # int4: [groups, N, 2]
    if weight.data.dim() == 4 and isinstance(rows, slice):
        first, last, step = rows.indices(weight.shape[0])
        if first % TILE == last % TILE == 0 and step == 1:  # whole tiles: no copy
            return weight._replace(data=weight.data[first // TILE:last // TILE], scale=scale)
    data = rows_of_data(weight, rows) if isinstance(rows, Tensor) else in_rows(weight).data[rows]
    return weight._replace(data=data, scale=scale)


def stack(above: Tensor | Quantized, below: Tensor | Quantized) -> Tensor | Quantized | None:
    """Two weights that read the same input as one weight, the rows of `above` first. None if they are quantised in
    different ways."""
    if not isinstance(above, Quantized) and not isinstance(below, Quantized):
        return torch.cat((above, below))
    if isinstance(above, Quantized) and isinstance(below, Quantized) and same_kind(above, below):
        scale = torch.cat((above.scale, below.scale), int(above.group > 0))
        return above._replace(data=torch.cat((in_rows(above).data, in_rows(below).data)), scale=scale)
    return None


def zero_rows(like: Tensor | Quantized, count: int) -> Tensor | Quantized:
    """A weight of `count` rows, all zeros, of the kind of `like`."""
    if not isinstance(like, Quantized):
        return like.new_zeros(count, like.shape[1])
    data = in_rows(like).data
    shape = [*like.scale.shape]
    shape[int(like.group > 0)] = count
    return like._replace(data=data.new_zeros(count, data.shape[1]), scale=like.scale.new_zeros(shape))


def in_kernel_order(weight: Tensor | Quantized | None) -> Tensor | Quantized | None:
    """Reorder the weight in place into the CPU kernels' tiles, if they take it, and return it. Its first product would
    do so anyway; if it is done before `rows_of`, slices of whole tiles share its memory."""
    on_cpu = isinstance(weight, Quantized) and weight.data.device.type == "cpu"  # first: for a GPU, none is compiled
    if on_cpu and cpu_kernels.takes_weight(weight):
        to_tiles(weight)
    return weight


def same_kind(one: Quantized, other: Quantized) -> bool:
    """Whether two weights, of any number of rows, can be stacked: the same number of columns, group, planes, rotation,
    scale dtype and column order."""
    same = one.shape[1] == other.shape[1] and one[2:5] == other[2:5]
    same = same and one.scale.dtype == other.scale.dtype
    if one.order is None or other.order is None:
        return same and one.order is other.order
    return same and torch.equal(one.order, other.order)


def drafting_rows(weight: Tensor | Quantized, ids: Tensor | None, quantized: bool) -> Tensor | Quantized:
    """The rows of the lm_head that are drafted from: those of `ids`, or all. For a quantised head they are int8, even
    where the target's are not, unless those are int4. Activations have 8 bits for int8: a draft need not be exact, and
    the best ten rarely change."""
    if ids is not None:
        weight = rows_of(weight, ids)
    if isinstance(weight, Quantized) and weight.group:
        return weight
    if quantized and (ids is not None or not isinstance(weight, Quantized)):  # a copy anyway: rotate it, as fc is
        exact = dequantize(weight, torch.float32) if isinstance(weight, Quantized) else weight.detach()
        weight = quantize_weight(exact, "int8dyn")
    return weight._replace(planes=1) if isinstance(weight, Quantized) else weight


# ----- Modules -----------------------------------------------------------------------------------------------------


class QuantizedLinear(nn.Module):
    """Takes the place of an nn.Linear. Its `weight` is a Quantized made of the buffers `data`, `scale` and, where there
    is one, `order`, so that it is moved and saved with the module."""

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("order", weight.order)
        self.bias = bias
        self.how = weight[2:5]  # group, planes, rotated

    @property
    def weight(self) -> Quantized:
        return Quantized(self.data, self.scale, *self.how, self.order)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def _apply(self, function, recurse=True):
        """What nn.Module.to calls. The scale moves to the new device but keeps its dtype; the integers go in rows."""
        scale = self.scale
        self.data = in_rows(self.weight).data
        super()._apply(function, recurse)
        self.scale = scale.to(self.data.device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """What state_dict calls. Files have the integers in rows."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}data"] = in_rows(self.weight).data


def mode_of(name: str, mode: str) -> str:
    """The mode for the linear of this name. An lm_head is always int8: its errors reach the choice of a token at
    once."""
    return "int8" if name == "lm_head" else mode


def quantize_linears(module: nn.Module, mode: str, group: int = 128, device: torch.device | str | None = None,
                     shrink: Sequence[float] = SHRINK, but: str | None = None) -> None:
    """Replace every nn.Linear in `module`, `but` the one of this path, by a QuantizedLinear, one after the other. The
    integers go to `device` (None: they stay where the weight was). A weight on the meta device gives shapes and dtypes
    only."""
    paths = [path for path, part in module.named_modules() if isinstance(part, nn.Linear) and path != but]
    for path in paths:  # a list of the linears themselves would keep their weights
        old = module.get_submodule(path)
        parent, _, name = path.rpartition(".")
        w = old.weight.detach().to(device or old.weight.device)
        weight = quantize_weight(w, mode_of(name, mode), group, shrink=shrink)
        setattr(module.get_submodule(parent), name, QuantizedLinear(weight, old.bias))


def prepare_linears(module: nn.Module, tensors: dict[str, Tensor], mode: str | None, group: int) -> None:
    """Make `module`, which is on the meta device, ready for `tensors`, the weights of a file of this mode: replace its
    linears by empty QuantizedLinears. In a file of the mode IMPORTED each weight says its own kind: it is integers
    where there is a NAME.data, of four bits where its NAME.scale is of groups.

    Raises ValueError for an order that is not a permutation of the columns. Shapes are left to formats.weights.fill.
    """
    if mode is None:
        return
    if mode != IMPORTED:
        quantize_linears(module, mode, group)
        return
    for path, old in list(module.named_modules()):
        if not isinstance(old, nn.Linear) or f"{path}.data" not in tensors:
            continue
        parent, _, name = path.rpartition(".")
        N, K = old.weight.shape
        scale, order = (tensors.get(f"{path}.{part}") for part in ("scale", "order"))
        if scale is None or scale.dim() != 3:
            weight = empty_quantized(N, K, "int8")
        else:
            group = -(-K // 256) * 256 // max(1, len(scale))
            group = group if group in GROUPS else 128
            weight = empty_quantized(N, K, "int4", group, zeros=scale.dtype == torch.float16)
        if order is not None:
            if not weight.group:
                raise ValueError(f"{path}.order: only int4 has one; convert the model again")
            if order.dtype != torch.int32 or not torch.equal(order.sort().values, torch.arange(K, dtype=torch.int32)):
                raise ValueError(f"{path}.order is no order of {K} columns: convert the model again")
            weight = weight._replace(order=order)
        setattr(module.get_submodule(parent), name, QuantizedLinear(weight, old.bias))


def is_quantized(module: nn.Module) -> bool:
    """Whether any linear of a model has integers for weights."""
    return any(isinstance(part, QuantizedLinear) for part in module.modules())


def stored_mode(path: Path, metadata: dict[str, str], quantize: str | None) -> tuple[str | None, int]:
    """Mode and group of a weight file, from its metadata: (None, 0) if it is not quantised. The group is 0 unless the
    mode is int4. Raises ValueError if they are unknown, or if the file is quantised and `quantize` asks for a mode."""
    mode = metadata.get("mode")
    group = metadata.get("group", "0")
    if mode == IMPORTED and quantize:
        raise ValueError(f"{path}: holds weights that others have quantised; for {quantize} convert the unquantised "
                         "model, or this one again with --dtype bfloat16")
    if mode and quantize:
        raise ValueError(f"{path}: holds {mode} already (group {group}); for {quantize} take model.safetensors")
    if mode and mode != IMPORTED and (mode not in MODES or (mode == "int4" and group not in map(str, GROUPS))):
        raise ValueError(f"{path}: {mode} in groups of {group} is not implemented; run quantize.py again")
    return mode, int(group) if mode == "int4" else 0
