"""Weight files: reading them whole, filling a module from them, and writing them piece by piece.

safetensors' own `save_file` needs all tensors in memory at once. The format is simple, so `write_file` writes it by
hand and needs one piece in memory at a time.
"""
import json
import mmap
import shutil
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from formats.downloads import not_what_it_is_called

FORMAT = "eagle2-native-1"  # the metadata entry "format" of a converted checkpoint; other files have another or none
# Their names in the header.
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.int8: "I8",
          torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL"}


# ----- Reading -----------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a .safetensors or .bin file, mapped from it, and the file's metadata ({} for a .bin file).

    Raises FileNotFoundError, or ValueError if the file is damaged or holds anything but tensors.
    """
    try:
        if path.suffix == ".bin":  # a pickle: weights_only accepts tensors and refuses code
            return plain_tensors(torch.load(path, map_location="cpu", weights_only=True, mmap=True)), {}
        with safe_open(path, framework="pt") as f:
            like = {name: f.get_tensor(name) for name in f.keys()}
            metadata = f.metadata() or {}
        return map_tensors(path, like), metadata
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; run convert_hf_checkpoint.py first") from None
    except Exception as e:  # a damaged pickle can raise any exception
        reason = not_what_it_is_called(path)
        if reason:
            raise ValueError(reason) from None
        raise ValueError(f"{path}: damaged, or not plain tensors ({first_line(e)}); convert or download it again"
                         ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; {} where it cannot be read, of which loading the file will say why."""
    try:
        with safe_open(path, framework="pt") as f:
            return f.metadata() or {}
    except Exception:  # safetensors raises types of its own
        return {}


def map_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, of the dtypes and shapes of `like`. When the memory of one is freed, its pages
    are given back. Otherwise they would count as this process's until the last tensor of the file is gone."""
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    start = 8 + int.from_bytes(mapping[:8], "little")
    header = json.loads(mapping[8:start])
    found = {}
    for name, tensor in like.items():
        first, last = (start + offset for offset in header[name]["data_offsets"])
        data = np.frombuffer(mapping, np.uint8, last - first, first)  # lives as long as the memory of the tensor
        page = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages: others hold the neighbours' numbers too
        size = last // mmap.PAGESIZE * mmap.PAGESIZE - page
        if size > 0:
            weakref.finalize(data, mapping.madvise, mmap.MADV_DONTNEED, page, size).atexit = False
        found[name] = torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)
    return found


def plain_tensors(unpickled: object) -> dict[str, Tensor]:
    """The tensors of a pickle, by name. TypeError unless it is a dictionary of tensors that have all of their numbers
    in memory. Others are sparse or quantised, have no data, or repeat one number for terabytes."""
    if not isinstance(unpickled, dict):
        raise TypeError("not a dictionary of tensors")
    for name, t in unpickled.items():
        is_plain = (isinstance(t, Tensor) and not (t.is_nested or t.is_quantized or t.is_meta)
                    and t.layout == torch.strided and t.nbytes <= t.untyped_storage().nbytes())
        if not is_plain:
            raise TypeError(f"{name!r} is no plain tensor")
    return {str(name): t for name, t in unpickled.items()}


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def empty_embedding(tokens: int, size: int) -> nn.Embedding:
    """An embedding to fill. nn.Embedding fills itself with random numbers: even on the meta device that imports
    torch._dynamo and sympy, in 2 s or more."""
    return nn.Embedding.from_pretrained(torch.empty(tokens, size), freeze=False)


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, device: torch.device | str,
         dtype: torch.dtype | None) -> None:
    """Give a module on the meta device its weights, moved to `device`, and make it ready for inference.

    `tensors` must have exactly the names and shapes of the module's state_dict; otherwise ValueError names `path` and
    what differs. Floating-point weights are converted to `dtype` (None: kept as they are). Quantised integers (.data),
    their scales (.scale) and the order of their columns (.order) keep their dtype, which must be the module's.
    `tensors` is empty afterwards: else it would keep what is replaced in the module later.
    """
    wanted = module.state_dict()
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path}: {problem} {', '.join(sorted(names)[:3])} (config.json describes another model?)")
    for name, tensor in tensors.items():
        like = wanted[name]
        is_quantized = name.endswith((".data", ".scale", ".order"))
        right_dtype = tensor.dtype == like.dtype if is_quantized else tensor.is_floating_point()
        if tensor.shape != like.shape or not right_dtype:
            raise ValueError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, config.json asks for "
                             f"{list(like.shape)}" + (f" in the file's mode, as {like.dtype}" if is_quantized else ""))
        tensors[name] = tensor.to(device, None if is_quantized else dtype)
    module.load_state_dict(tensors, assign=True)
    tensors.clear()
    module.requires_grad_(False).eval()


# ----- Writing -----------------------------------------------------------------------------------------------------


def write_file(path: Path, like: dict[str, Tensor], pieces: Iterable[Tensor], metadata: dict[str, str],
               label: str | None) -> None:
    """Write a safetensors file: the length of the header (8 bytes), the header in JSON, then the data.

    `like` gives the names, shapes and dtypes, for example of meta tensors. `pieces` gives the data in the same order;
    a tensor may come in several pieces, one below the other. `label` stands in front of the progress bar; None:
    no bar. Raises OSError before anything is written if the disk is too full.
    """
    header = {"__metadata__": metadata}
    end = 0
    for name, tensor in like.items():
        start = end
        end = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    if (free := shutil.disk_usage(path.parent).free) < end + len(text):
        raise OSError(f"{path.name}: {end / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on this disk")
    bar = tqdm(total=end, unit="B", unit_scale=True, desc=label, disable=label is None)
    with open(path, "wb") as file, bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            bar.update(file.write(piece.cpu().contiguous().flatten().view(torch.uint8).numpy()))


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file of tensors that are in memory. (The library's `save_file` reports a full disk as an
    error of its own kind, and lets nobody else read the file.)"""
    write_file(path, tensors, tensors.values(), metadata or {}, None)
