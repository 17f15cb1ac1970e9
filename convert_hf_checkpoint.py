"""Turn a Hugging Face folder, a hub id or a GGUF file into the one kind of folder that the other scripts read.

    python convert_hf_checkpoint.py meta-llama/Llama-2-7b-chat-hf --eagle yuhuili/EAGLE-llama2-chat-7B
    python convert_hf_checkpoint.py SmolLM2-135M-Instruct.Q4_1.gguf --out checkpoints/demo
    python convert_hf_checkpoint.py checkpoints/meta-llama/Llama-2-7b-chat-hf --eagle path/to/another/head

The folder (default: checkpoints/ and the hub id, or the last two parts of the path) gets config.json and tokenizer
files as published (GGUF: made from its metadata), model.safetensors with q, k, v and gate, up fused, and eagle/, a
draft head as published. Memory is needed for one tensor at a time. Files appear when all are written, config.json last.
"""
import argparse
import json
import math
import os
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
from formats.gguf import gguf_config, open_gguf, write_gguf_tokenizer
from formats.hf import NAMES, Lazy, hf_names, open_folder
from formats.tokenizer_files import read_json
from formats.weights import FORMAT, read_tensors, write_file
from model import Llama

FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"}


@contextmanager
def staged(out: Path, source: Path) -> Iterator[Path]:
    """A scratch folder in `out`; its files move up, config.json last, unless something went wrong."""
    part, made = out / ".part", [folder for folder in (out, *out.parents) if not folder.exists()]
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    try:
        yield part
        old = ("config.json", *FILES, CURVE, "model.safetensors", "pytorch_model.bin")  # never mix old and new
        for file in (*map(out.joinpath, old), *out.glob("model-int*.safetensors")):
            file.unlink(missing_ok=True)
        for file in sorted(part.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, out / file.name)
    except Exception as err:  # whatever is wrong with the source or the disk
        why = f"{err} is missing" if isinstance(err, KeyError) else err
        raise ValueError(f"{source} -> {out} failed: {why}") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with suppress(OSError):  # the first one is not empty: all went well
            for folder in made:
                folder.rmdir()


def write_weights(path: Path, tensors: dict[str, Lazy], config: Config, dtype: torch.dtype, source: str) -> None:
    """The tensors of a Llama, each of one or more pieces."""
    with torch.device("meta"):
        wanted = Llama(config, qkv_bias=any(name.endswith("q_proj.bias") for name in tensors)).state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    pieces = {ours: hf_names(ours, NAMES) for ours in wanted}
    names = [name for theirs in pieces.values() for name in theirs]
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if missing or unknown:
        raise ValueError(f"config.json does not fit the weights: missing {missing[:4]}, not implemented {unknown[:4]}")
    for ours, like in wanted.items():
        found = [tensors[name][0] for name in pieces[ours]]
        if sum(map(math.prod, found)) != like.numel() or any(shape[1:] != like.shape[1:] for shape in found):
            raise ValueError(f"config.json does not fit the weights: {pieces[ours]} {found} make no {list(like.shape)}")
        wanted[ours] = like.to(dtype)
    metadata = {"format": FORMAT, "source": source, "dtype": str(dtype).removeprefix("torch.")}
    write_file(path, wanted, (tensors[name][1]().to(dtype) for name in names), metadata, "converting")


def convert(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16, name: str | None = None) -> None:
    """Write the folder `out` from `source`, a Hugging Face folder or a .gguf file, with all weights in `dtype`.

    `name` is what the metadata calls the source. ValueError, and `out` as it was, if anything is wrong.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: the source itself would be overwritten; choose another --out")
    with staged(out, source) as part:
        if source.suffix == ".gguf":
            meta, tensors = open_gguf(source)
            (part / "config.json").write_text(json.dumps(gguf_config(meta, tensors, dtype), indent=2))
            config = Config.load(part)
            write_gguf_tokenizer(meta, part)
        else:
            config, tensors = Config.load(source / "config.json"), open_folder(source)
            for file in FILES & set(os.listdir(source)):
                shutil.copyfile(source / file, part / file)
        head = tensors.pop("lm_head.weight", None) if config.tie_word_embeddings else None
        if head and not torch.equal(head[1](), tensors["model.embed_tokens.weight"][1]()):  # the weights know better
            raw = read_json(part / "config.json") | {"tie_word_embeddings": False}
            (part / "config.json").write_text(json.dumps(raw, indent=2))
            config, tensors["lm_head.weight"] = Config.load(part), head
        write_weights(part / "model.safetensors", tensors, config, dtype, name or source.resolve().name)


def add_eagle(head: Path, out: Path) -> None:
    """Copy a published EAGLE-1/2 head to `out`/eagle as it is. ValueError if it would not load there."""
    with torch.device("meta"):
        target = Llama(Config.load(out))
    load_head(head, target)
    with staged(out / "eagle", head) as part:
        for file in {"config.json", "model.safetensors", "pytorch_model.bin", VOCAB, CURVE} & set(os.listdir(head)):
            shutil.copyfile(head / file, part / file)


def fetch(source: str, token: str | None, is_target: bool) -> Path:
    """A path as it is, or the snapshot of a hub id. A target that is not implemented is refused before the download."""
    if Path(source).exists():
        return Path(source)
    page, download = f"{constants.ENDPOINT}/{source}", partial(snapshot_download, source, token=token)
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
                      "check the page and the network, then run this again: files that are whole are kept") from err


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hugging Face folder, hub id (org/name) or .gguf file; or a converted folder")
    parser.add_argument("--out", type=Path, help="the folder to write (default: checkpoints/org/name)")
    parser.add_argument("--eagle", metavar="ID_OR_DIR", help="also copy this draft head, to <out>/eagle")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--token", help="hub token (default: that of `hf auth login`)")
    args = parser.parse_args()
    try:
        source = fetch(args.source, args.token, is_target=True)
        name = "/".join(source.resolve().parts[-2:]) if source == Path(args.source) else args.source
        out = args.out or Path("checkpoints", name.removesuffix(".gguf"))
        head = fetch(args.eagle, args.token, is_target=False) if args.eagle else None
        file = source / "model.safetensors"
        if file.is_file() and read_tensors(file)[1].get("format") == FORMAT:
            out = source  # it is converted already; only a head is to be added
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
