"""Medusa heads on disk. Three programs write them, each with its own names for the tensors; here they become one.

The tensors that drafters/medusa.py wants, for B blocks and H heads of hidden size C and V tokens:

    weight       [B, H, C, C]
    bias         [B, H, C]
    projections  [H, V, C], only if the heads do not use the target's lm_head
"""
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from formats.eagle import folder_of, read_config
from formats.foreign import FLOATS, kind_of_head
from formats.weights import plain_tensors, read_tensors

# Where the weights are: as text-generation-inference, the authors and vLLM call the file.
FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors")
# Names after `common_name`. A projection is numbered like a block, after the last one of its head.
BLOCK = re.compile(r"(\d{1,3})\.(\d{1,3})\.linear\.(weight|bias)")
PROJECTION = re.compile(r"(\d{1,3})\.(\d{1,3}|projection)\.weight")
Place = tuple[int, int]  # where a tensor belongs: block (0 for a projection) and head


def open_heads(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of published heads, which is `path` or in that folder, and its tensors. Raises FileNotFoundError, or
    ValueError if the file is damaged or holds draft heads of another kind, which are then named."""
    folder = folder_of(path)
    raw = read_config(folder)
    file = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        names = [file.name for file in sorted(folder.glob("*_lm_head.*"))]
        other = kind_of_head(names, raw) or ""
        raise FileNotFoundError(f"{path}: no Medusa heads there: neither {', '.join(FILES[:-1])} nor {FILES[-1]}"
                                + (other and f"; these are {other}"))
    published = read_pickle(file) if file.suffix == ".pt" else read_tensors(file)[0]
    kind = kind_of_head(published, raw)
    if kind and not kind.startswith("Medusa"):
        raise ValueError(f"{file}: holds {kind}; only Medusa heads can be given here")
    return file, published


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pt file. Raises ValueError if it is damaged or holds anything else, such as code."""
    try:
        return plain_tensors(torch.load(path, map_location="cpu", weights_only=True))
    except Exception:  # a damaged pickle raises anything; PyTorch's own message advises to run its code
        raise ValueError(f"{path}: damaged, or not a dictionary of plain tensors; download it again") from None


def shares_lm_head(path: Path) -> bool:
    """Whether a config.json says that the heads use the target's lm_head: version 2 of text-generation-inference, or
    vLLM's original_lm_head. False if there is no file. Raises ValueError if it is not a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not JSON ({e})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: not a JSON object")
    return str(config.get("version")) == "2" or config.get("original_lm_head") is True


def arrange(path: Path, published: dict[str, Tensor], size: int, vocab_size: int) -> dict[str, Tensor]:
    """The tensors of a file, stacked as the module docstring says, for a target of this hidden size and vocabulary.

    Raises ValueError that names `path` for an unknown name, a wrong shape, or if any block of any head is missing.
    """
    found, projections_after = sort_by_place(path, published, size, vocab_size)
    if not found["weight"]:
        raise ValueError(f"{path}: holds no Medusa heads")
    places = [place for tensors in found.values() for place in tensors]
    num_blocks, num_heads = (1 + max(numbers) for numbers in zip(*places))
    for kind, tensors in found.items():
        expected = num_heads if kind == "projections" else num_blocks * num_heads
        if tensors and len(tensors) != expected:
            raise ValueError(f"{path}: has {len(tensors)} tensors of {kind}, but {num_heads} heads of {num_blocks} "
                             f"blocks need {expected}")
    if projections_after - {"projection", str(num_blocks)}:
        raise ValueError(f"{path}: its projections follow {', '.join(sorted(projections_after))} blocks, but it has "
                         f"{num_blocks}")
    return stacked(found, num_blocks, num_heads)


def sort_by_place(path: Path, published: dict[str, Tensor], size: int, vocab_size: int
                  ) -> tuple[dict[str, dict[Place, Tensor]], set[str]]:
    """The tensors of a file by kind ("weight", "bias", "projections") and place, and the numbers that the names of the
    projections give as their place in the head: how many blocks they follow, or the word "projection"."""
    shapes = {"weight": (size, size), "bias": (size,), "projections": (vocab_size, size)}
    found = {kind: {} for kind in shapes}
    projections_after = set()
    for name, tensor in published.items():
        plain = common_name(name)
        if plain == "token_map":  # vLLM's draft vocabulary: ignored, since there are rows for all tokens
            continue
        if block := BLOCK.fullmatch(plain):
            kind = block[3]
            place = int(block[2]), int(block[1])
        elif projection := PROJECTION.fullmatch(plain):
            kind = "projections"
            place = 0, int(projection[1])
            projections_after.add(projection[2])
        else:
            raise ValueError(f"{path}: {name} is no part of Medusa's heads")
        if tensor.shape != shapes[kind] or tensor.dtype not in FLOATS:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, and for this target should be "
                             f"{list(shapes[kind])} of floating point: another model's")
        if place in found[kind]:
            raise ValueError(f"{path}: {name} is there under another name too")
        found[kind][place] = tensor
    return found, projections_after


def common_name(name: str) -> str:
    """A published name as "HEAD.BLOCK.linear.KIND" or, for a projection, "HEAD.NUMBER.weight". Only vLLM's names
    differ, apart from a prefix that some files have."""
    name = re.sub(r"^medusa_heads?\.", "", name)
    name = re.sub(r"^blocks\.(\d+)\.layers\.(\d+)\.", r"\1.\2.linear.", name)
    return re.sub(r"^lm_heads\.(\d+)\.", r"\1.projection.", name)


def stacked(found: dict[str, dict[Place, Tensor]], num_blocks: int, num_heads: int) -> dict[str, Tensor]:
    """The tensors by place as two stacked tensors, or three with projections. A missing bias is filled with zeros:
    vLLM's heads may have none."""
    tensors = {kind: torch.stack([by_place[place] for place in sorted(by_place)]).unflatten(0, (-1, num_heads))
               for kind, by_place in found.items() if by_place}
    if "projections" in tensors:
        tensors["projections"] = tensors["projections"][0]
    if "bias" not in tensors:
        tensors["bias"] = tensors["weight"].new_zeros(num_blocks, num_heads, tensors["weight"].shape[-1])
    return tensors
