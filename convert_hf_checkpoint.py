"""Convert a Hugging Face folder, a hub id or a GGUF file to the kind of folder that all other scripts read.

    python convert_hf_checkpoint.py meta-llama/Llama-2-7b-chat-hf --eagle yuhuili/EAGLE-llama2-chat-7B
    python convert_hf_checkpoint.py SmolLM2-135M-Instruct.Q4_1.gguf --out checkpoints/demo
    python convert_hf_checkpoint.py checkpoints/meta-llama/Llama-2-7b-chat-hf --eagle path/to/another/head

The folder is --out, or checkpoints/ and the hub id, or checkpoints/ and the last two parts of the path. It gets

    config.json, tokenizer files   as published; for a GGUF file made from its metadata
    model.safetensors              all weights, with q, k, v fused, and gate, up fused
    eagle/                         the draft head, as published

One tensor is in memory at a time. The files appear together at the end, config.json last, so that a run that is killed
leaves nothing that loads.
"""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads sleep (docs/benchmarking.md)

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants, errors, snapshot_download

from draft import load_head
from formats.config import Config
from formats.eagle import CURVE, VOCAB
from formats.gguf import gguf_config, is_gguf, open_gguf
from formats.gguf_tokenizer import write_gguf_tokenizer
from formats.hf import NAMES, LazyTensor, hf_names, open_folder
from formats.tokenizer_files import read_json
from formats.weights import FORMAT, read_tensors, write_file
from model import Llama

# What is copied from a Hugging Face folder besides the weights.
FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"}


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """Yield a scratch folder in `out`. When the block ends, its files replace those of `out`, config.json last. After
    an error `out` is as it was, and the error is a ValueError that names both folders."""
    part = out / ".part"
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        remove_old(out)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
    except Exception as err:
        # Deliberately every Exception. The source is a download, and what a damaged one raises cannot be listed: gguf
        # raises IndexError and UnicodeDecodeError, a missing entry KeyError, `tokenizers` a bare Exception, the disk
        # OSError. So a bug in this file looks like bad input too; the cause keeps its traceback.
        reason = f"{err} is missing" if isinstance(err, KeyError) else err
        raise ValueError(f"{source} -> {out} failed: {reason}") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # after a success `out` is not empty, so that the first rmdir fails
            for folder in new_folders:
                folder.rmdir()


def remove_old(out: Path) -> None:
    """Remove what an earlier run wrote into `out`, and what quantize.py made of it: old and new files never mix."""
    old = ("config.json", *FILES, CURVE, "model.safetensors", "pytorch_model.bin")
    for file in (*map(out.joinpath, old), *out.glob("model-int*.safetensors")):
        file.unlink(missing_ok=True)


def write_weights(path: Path, tensors: dict[str, LazyTensor], config: Config, dtype: torch.dtype, source: str) -> None:
    """Write the model.safetensors of a Llama: each of our tensors is one or more of `tensors`, one below the other.

    Raises ValueError before anything is written if a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        wanted = Llama(config, qkv_bias=any(name.endswith("q_proj.bias") for name in tensors)).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    pieces = {ours: hf_names(ours, NAMES) for ours in wanted}
    names = [name for hf in pieces.values() for name in hf]  # in the order of the file
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if missing or unknown:
        raise ValueError(f"config.json does not fit the weights: missing {missing[:4]}, not implemented {unknown[:4]}")
    for ours, like in wanted.items():
        shapes = [tensors[name][0] for name in pieces[ours]]
        if sum(map(math.prod, shapes)) != like.numel() or any(shape[1:] != like.shape[1:] for shape in shapes):
            raise ValueError(f"config.json does not fit the weights: {pieces[ours]} of shapes {shapes} should make "
                             f"{list(like.shape)}")
        wanted[ours] = like.to(dtype)
    metadata = {"format": FORMAT, "source": source, "dtype": str(dtype).removeprefix("torch.")}
    write_file(path, wanted, (tensors[name][1]().to(dtype) for name in names), metadata, "converting")


def convert(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16, name: str | None = None) -> None:
    """Convert `source`, a Hugging Face folder or a .gguf file, to the folder `out`, with all weights in `dtype`.

    `name` goes into the metadata as the source (default: the name of the folder or file). Raises ValueError if anything
    is wrong; `out` is then as it was.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: the source itself would be overwritten; choose another --out")
    with staged(out, source) as part:
        if is_gguf(source):
            metadata, tensors = open_gguf(source)
            raw = gguf_config(metadata, tensors, dtype)
            config = Config.from_dict(raw)
            (part / "config.json").write_text(json.dumps(raw, indent=2))
            write_gguf_tokenizer(metadata, part)
        else:
            config = Config.load(source / "config.json")
            tensors = open_folder(source)
            for file in FILES & set(os.listdir(source)):
                shutil.copyfile(source / file, part / file)
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            lm_head = tensors.pop("lm_head.weight")
            read_head = lm_head[1]
            read_embedding = tensors["model.embed_tokens.weight"][1]
            if not torch.equal(read_head(), read_embedding()):  # the config is wrong: these are two matrices
                raw = read_json(part / "config.json") | {"tie_word_embeddings": False}
                (part / "config.json").write_text(json.dumps(raw, indent=2))
                config = Config.load(part)
                tensors["lm_head.weight"] = lm_head
        write_weights(part / "model.safetensors", tensors, config, dtype, name or source.resolve().name)


def add_eagle(head: Path, out: Path) -> None:
    """Copy a published EAGLE-1/2 head to the folder eagle/ of `out`, unchanged. Raises ValueError if it does not load
    as a head of the model in `out`."""
    with torch.device("meta"):
        target = Llama(Config.load(out))
    load_head(head, target)
    with staged(out / "eagle", head) as part:
        for file in {"config.json", "model.safetensors", "pytorch_model.bin", VOCAB, CURVE} & set(os.listdir(head)):
            shutil.copyfile(head / file, part / file)


def fetch(source: str, token: str | None, is_target: bool) -> Path:
    """A path that exists, as it is, or else the downloaded snapshot of a hub id. Raises ValueError for a target that is
    not implemented, before its weights are downloaded, and OSError where the download fails."""
    if Path(source).exists():
        return Path(source)
    page = f"{constants.ENDPOINT}/{source}"
    download = partial(snapshot_download, source, token=token)
    try:
        folder = Path(download(allow_patterns=["config.json"]))
        if is_target:
            Config.load(folder)
        folder = Path(download(allow_patterns=[*FILES, "model*.safetensors", "model.safetensors.index.json"]))
        if not any(folder.glob("model*.safetensors")):
            download(allow_patterns=["pytorch_model*.bin", "pytorch_model.bin.index.json"])
        return folder
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as err:
        why = "gated" if isinstance(err, errors.GatedRepoError) else "neither a path here nor a public repository"
        raise OSError(f"{source} is {why}: check the name or ask for access at {page}; then `hf auth login`") from err
    except ValueError:
        raise
    except Exception as err:  # network errors have other classes in every version of huggingface_hub
        raise OSError(f"{source}: downloading {page} failed ({type(err).__name__}: {str(err).splitlines()[0]}); "
                      "check the page and the network, then run this again: complete files are kept") from err


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hugging Face folder, a hub id (ORG/NAME) or a .gguf file; or, to add a head, "
                        "a converted folder")
    parser.add_argument("--out", type=Path, help="the folder to write (default: checkpoints/ORG/NAME)")
    parser.add_argument("--eagle", metavar="ID_OR_DIR", help="also copy this draft head to <out>/eagle")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--token", help="hub token (default: the one from `hf auth login`)")
    args = parser.parse_args()
    try:
        source = fetch(args.source, args.token, is_target=True)
        name = "/".join(source.resolve().parts[-2:]) if source == Path(args.source) else args.source
        out = args.out or Path("checkpoints", re.sub(r"(?i)\.gguf$", "", name))
        head = fetch(args.eagle, args.token, is_target=False) if args.eagle else None
        file = source / "model.safetensors"
        if file.is_file() and read_tensors(file)[1].get("format") == FORMAT:
            out = source  # already converted: only add the head
        else:
            convert(source, out, getattr(torch, args.dtype), name)
        if head:
            add_eagle(head, out)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
    print(out)


if __name__ == "__main__":
    main()
