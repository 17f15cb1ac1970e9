"""From weights to integers, and the linear layer that holds them. What the integers mean is qlinears.py's to say.

int8 has nothing to choose: a row's largest value becomes 127. int4 has. The range of a group of columns may be shrunk,
which clips its outliers and halves the error of everything else; and an error made in one column can be undone in the
columns after it, as far as the layer's inputs go together (GPTQ, arXiv 2210.17323). Both want to know the inputs, as
the Hessian x.T @ x of a text, which quantize.py collects; without it each group gets the scale of least squared error,
and each weight the nearest integer.

Where a group holds many zeros, zero stays zero: what widen.py leaves dead must not come to life.
"""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ops.linear import linear
from ops.quantized import ROTATION, Quantized, pack, rotate
from quant.int4 import SHRINK, gptq, nearest, search, weights

MODES = ("int8", "int8dyn", "int4")
GROUPS = (64, 128)
ROWS = 4096  # quantised together: what is needed in fp32 beside the weights


def layout(N: int, K: int, mode: str, group: int, device: torch.device | str = "meta") -> Quantized:
    """Of a weight [N, K], not filled in. Raises ValueError where mode or group is unknown."""
    if mode not in MODES:
        raise ValueError(f"quantisation {mode!r} is not known: there is {', '.join(MODES)}")
    if mode != "int4":
        rotated = mode == "int8dyn" and K % ROTATION == 0
        return Quantized(torch.empty(N, K, dtype=torch.int8, device=device), torch.empty(N, device=device), 0,
                         1 if mode == "int8dyn" else 2, rotated)
    if group not in GROUPS:
        raise ValueError(f"int4 in groups of {group} is not implemented: use {' or '.join(map(str, GROUPS))}")
    half = -(-K // 256) * 128
    return Quantized(torch.empty(N, half, dtype=torch.int8, device=device),
                     torch.empty(2 * half // group, N, 2, dtype=torch.bfloat16, device=device), group, 2)


def quantize_weight(w: Tensor, mode: str, group: int = 128, hessian: Tensor | None = None,
                    shrink: Sequence[float] = SHRINK) -> Quantized:
    """w [N, K], any dtype and device. int4 with the `hessian` [K, K] of its inputs (fp32, mean of x.T @ x) is GPTQ, and
    without it the search alone, of which shrink=(1,) leaves round-to-nearest."""
    out = layout(*w.shape, mode, group, w.device)
    count = None if hessian is None else weights(hessian)
    for first in range(0, len(w), ROWS):
        rows = slice(first, first + ROWS)
        part = w[rows].float()
        if mode == "int4":
            scale, offset = search(part, group, count, shrink)
            out.scale[:len(scale), rows] = torch.stack((scale / 16, offset), -1).bfloat16()
            out.scale[len(scale):, rows] = 0  # of padding
            if hessian is None:
                out.data[rows] = pack(nearest(part, scale, offset, group))
        else:
            part = rotate(part) if out.rotated else part
            out.scale[rows] = part.abs().amax(1) / 127
            out.data[rows] = (part / out.scale[rows, None].clamp(min=1e-30)).round().to(torch.int8)
    if hessian is not None and mode == "int4":
        scale, offset = out.scale.float().unbind(-1)
        out.data.copy_(pack(gptq(w.float(), scale * 16, offset, group, hessian)))
    return out


def rows_of(weight: Tensor | Quantized, rows: Tensor | slice) -> Tensor | Quantized:
    """Some outputs of a linear layer, of 8 bits or not quantised."""
    if not isinstance(weight, Quantized):
        return weight[rows]
    return weight._replace(data=weight.data[rows], scale=weight.scale[rows])


def stack(above: Tensor | Quantized, below: Tensor | Quantized) -> Tensor | Quantized | None:
    """Two linear layers of the same input as one, where they are of one kind and not of 4 bits."""
    if not isinstance(above, Quantized) and not isinstance(below, Quantized):
        return torch.cat((above, below))
    if isinstance(above, Quantized) and isinstance(below, Quantized) and above[2:] == below[2:] and not above.group:
        return above._replace(data=torch.cat((above.data, below.data)), scale=torch.cat((above.scale, below.scale)))
    return None


class QuantizedLinear(nn.Module):
    """In place of nn.Linear: its `weight` is Quantized, made of buffers, which move and are saved as weights are."""

    def __init__(self, weight: Quantized, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)
        self.bias, self.how = bias, weight[2:]

    @property
    def weight(self) -> Quantized:
        return Quantized(self.data, self.scale, *self.how)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def _apply(self, function, recurse=True):
        """Of nn.Module.to: a dtype is for what is computed with, not for scales."""
        scale = self.scale
        super()._apply(function, recurse)
        self.scale = scale.to(self.data.device)
        return self


def mode_of(name: str, mode: str) -> str:
    """Of the linear of this name: an lm_head is int8 in any mode, as its errors reach the choice of a token at once."""
    return "int8" if name == "lm_head" else mode


def quantize_linears(module: nn.Module, mode: str, group: int = 128, device: torch.device | str | None = None,
                     shrink: Sequence[float] = SHRINK) -> None:
    """Every nn.Linear of `module`, one after the other; `device` is where their integers go. On the meta device
    shapes and dtypes alone."""
    for name, old in list(module.named_modules()):
        if isinstance(old, nn.Linear):
            parent, _, own = name.rpartition(".")
            how = mode_of(own, mode)
            weight = layout(*old.weight.shape, how, group) if old.weight.is_meta else quantize_weight(
                old.weight.detach().to(device or old.weight.device), how, group, shrink=shrink)
            setattr(module.get_submodule(parent), own, QuantizedLinear(weight, old.bias))


def stored_mode(path: Path, metadata: dict[str, str], quantize: str | None) -> tuple[str | None, int]:
    """How a file says that it is quantised: mode and group. ValueError where that is unknown, or to be done again."""
    mode, group = metadata.get("mode"), metadata.get("group", "0")
    if mode and quantize:
        raise ValueError(f"{path}: holds {mode} already (group {group}); for {quantize} take model.safetensors")
    if mode and (mode not in MODES or mode == "int4" and group not in map(str, GROUPS)):
        raise ValueError(f"{path}: {mode} in groups of {group} is not implemented; run quantize.py again")
    return mode, int(group) if mode == "int4" else 0
