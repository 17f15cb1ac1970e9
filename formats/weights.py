"""Writing a safetensors file piece by piece, so that no more than one piece is ever in memory.

safetensors' own `save_file` wants all tensors at once; the format is simple enough to write by hand.
"""
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

FORMAT = "eagle2-native-1"  # the safetensors metadata entry that tells a converted file from any other


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a .safetensors or .bin file, memory-mapped, and the metadata; ValueError if it is damaged."""
    try:
        if path.suffix == ".bin":  # a pickle: weights_only admits tensors and refuses code
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError("not a dictionary of tensors")
            return tensors, {}
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; run convert_hf_checkpoint.py first") from None
    except Exception as e:  # a damaged pickle raises anything
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(f"{path}: damaged, or not plain tensors ({reason}); convert or download it again") from None


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path, device: torch.device | str,
         dtype: torch.dtype | None) -> None:
    """Give a meta-device `module` its weights; every name and shape must match, or ValueError says which not."""
    wanted = module.state_dict()
    for problem, names in (("lacks", wanted.keys() - tensors.keys()), ("has unknown", tensors.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path}: {problem} {', '.join(sorted(names)[:3])} (config.json describes another model?)")
    for name, tensor in tensors.items():
        like, integers = wanted[name], name.endswith((".data", ".scale"))
        if tensor.shape != like.shape or (tensor.dtype != like.dtype if integers else not tensor.is_floating_point()):
            raise ValueError(f"{path}: {name} is {list(tensor.shape)} of {tensor.dtype}, config.json asks for "
                             f"{list(like.shape)}" + (f" in the file's mode, as {like.dtype}" if integers else ""))
        tensors[name] = tensor.to(device, None if integers else dtype)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()


DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8"}


def write_file(path: Path, like: dict[str, Tensor], pieces: Iterable[Tensor], metadata: dict[str, str],
               doing: str) -> None:
    """A safetensors file: the length of the header, the header in JSON, and the bytes, one piece after the other. They
    make up tensors of the names, shapes and dtypes of `like`, in this order."""
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in like.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    if (free := shutil.disk_usage(path.parent).free) < end + len(text):
        raise OSError(f"{end / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on the disk of {path.parent}")
    with open(path, "wb") as file, tqdm(total=end, unit="B", unit_scale=True, desc=doing) as bar:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in pieces:
            bar.update(file.write(piece.cpu().contiguous().flatten().view(torch.uint8).numpy()))
