"""Writing a safetensors file piece by piece, so that no more than one piece is ever in memory.

safetensors' own `save_file` wants all tensors at once; the format is simple enough to write by hand.
"""
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

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
