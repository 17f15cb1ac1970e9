"""Medusa heads on the disk: three layouts of names."""
import json
import re
from pathlib import Path

import torch
from torch import Tensor

FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors")  # TGI's, the authors', vLLM's
BLOCK = re.compile(r"(\d{1,3})\.(\d{1,3})\.linear\.(weight|bias)")
PROJECTION = re.compile(r"(\d{1,3})\.(\d{1,3}|projection)\.weight")  # numbered as the head's blocks are, after them


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file: weights_only admits them and refuses code."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # there is little that a damaged pickle does not raise; PyTorch's own advice is to run its code
        tensors = None
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: damaged, or not a dictionary of plain tensors; download it again")
    return {str(name): tensor for name, tensor in tensors.items()}


def shares_lm_head(path: Path) -> bool:
    """What a config.json says: TGI's has a version, vLLM's a flag."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return str(config.get("version")) == "2" or config.get("original_lm_head") is True


def arrange(path: Path, published: dict[str, Tensor], size: int, vocab_size: int) -> dict[str, Tensor]:
    """A file's tensors as MedusaHeads has them, for a target of this hidden size and vocabulary."""
    shapes = {"weight": (size, size), "bias": (size,), "projections": (vocab_size, size)}
    found, after = {kind: {} for kind in shapes}, set()  # by block (0 for a projection) and head
    for name, tensor in published.items():
        plain = common_name(name)
        if plain == "token_map":  # vLLM's draft vocabulary: with rows for all tokens, all may be drafted
            continue
        if block := BLOCK.fullmatch(plain):
            kind, place = block[3], (int(block[2]), int(block[1]))
        elif projection := PROJECTION.fullmatch(plain):
            kind, place = "projections", (0, int(projection[1]))
            after.add(projection[2])  # so many blocks
        else:
            raise ValueError(f"{path}: {name} is no part of Medusa's heads")
        if tensor.shape != shapes[kind] or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, and for this target should be "
                             f"{list(shapes[kind])} of floating point: another model's")
        if place in found[kind]:
            raise ValueError(f"{path}: {name} is there under another name too")
        found[kind][place] = tensor
    if not found["weight"]:
        raise ValueError(f"{path}: holds no Medusa heads")
    layers, count = (1 + max(numbers) for numbers in zip(*(place for places in found.values() for place in places)))
    for kind, places in found.items():
        whole = count if kind == "projections" else layers * count
        if places and len(places) != whole:
            raise ValueError(f"{path}: has {len(places)} tensors of {kind}, but {count} heads of {layers} blocks want "
                             f"{whole}")
    if after - {"projection", str(layers)}:
        raise ValueError(f"{path}: its projections follow {', '.join(sorted(after))} blocks, but it has {layers}")
    return stacked(found, layers, count)


def common_name(name: str) -> str:
    """{head}.{block}.linear.{kind} or {head}.{any}.weight, as all but vLLM call them."""
    name = re.sub(r"^medusa_heads?\.", "", name)
    name = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name)
    return re.sub(r"^lm_heads\.(\d+)\.", r"\1.projection.", name)


def stacked(found: dict[str, dict[tuple[int, int], Tensor]], layers: int, count: int) -> dict[str, Tensor]:
    """As three tensors or, without projections, two."""
    tensors = {kind: torch.stack([places[place] for place in sorted(places)]).unflatten(0, (-1, count))
               for kind, places in found.items() if places}
    if "projections" in tensors:
        tensors["projections"] = tensors["projections"][0]
    if "bias" not in tensors:  # as vLLM's heads may be
        tensors["bias"] = tensors["weight"].new_zeros(layers, count, tensors["weight"].shape[-1])
    return tensors
