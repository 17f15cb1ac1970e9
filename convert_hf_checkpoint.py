"""Convert a Hugging Face folder, a hub id or a GGUF file to the kind of folder that all other scripts read.

    python convert_hf_checkpoint.py meta-llama/Llama-2-7b-chat-hf --eagle yuhuili/EAGLE-llama2-chat-7B
    python convert_hf_checkpoint.py Qwen2.5-14B-Instruct-Q4_K_M.gguf --out checkpoints/qwen-14b
    python convert_hf_checkpoint.py Qwen/Qwen3-8B-AWQ
    python convert_hf_checkpoint.py checkpoints/meta-llama/Llama-2-7b-chat-hf --eagle path/to/another/head

The folder is --out, or checkpoints/ and the hub id, or checkpoints/ and the last two parts of the path. It gets

    config.json, tokenizer files   as published; for a GGUF file made from its metadata
    model.safetensors              all weights, with q, k, v fused, and gate, up fused
    eagle/, eagle3/ or block/      the draft head, as published, and what was measured of it (app/install.py)

Quantised weights keep their integers if this engine has the same format; inexact conversions are printed, and
docs/quantization.md has a table. With --dtype all weights become floating point.

One tensor is in memory at a time. What was written is loaded as generate.py would load it. Only then it replaces what
an earlier run wrote (formats/writing.py), so that a run that is killed leaves nothing that loads half.
"""
from app.command import before_imports, raise_on_ctrl_c, run_command, watch_for_ctrl_c

if __name__ == "__main__":
    before_imports()

import argparse
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from app.install import add_head, staged
from formats.config import Config
from formats.fold import fold
from formats.gguf import gguf_config, is_gguf, open_gguf
from formats.gguf_tokenizer import write_gguf_tokenizer
from formats.hf import NAMES, LazyTensor, hf_names, open_folder
from formats.hub import FILES, check_folder, fetch, name_of
from formats.tokenizer_files import TOKENIZERS, read_json
from formats.weights import FORMAT, fill, read_tensors, write_file
from model import Llama
from quant.converted import Conversion, plain_dtype
from quant.linear import IMPORTED, prepare_linears, stored_mode
from quant.published import with_values
from tokenizer import Tokenizer


def write_weights(path: Path, tensors: dict[str, LazyTensor], config: Config, dtype: torch.dtype | None, source: str
                  ) -> None:
    """Write the model.safetensors of a Llama: each of our tensors is one or more of `tensors`, joined along dim 0.
    dtype None: packed (quantised) weights keep their integers; without any of them, all is bfloat16.

    Raises ValueError before anything is written if a tensor is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        wanted = Llama(config, qkv_bias=any(name.endswith("q_proj.bias") for name in tensors)).state_dict()
    pieces = {ours: hf_names(ours, NAMES) for ours in wanted}
    keep = dtype is None and any(tensor.packed for tensor in tensors.values())
    embedding = hf_names("embed.weight", NAMES)
    [last_norm] = hf_names("norm.weight", NAMES)
    if config.tie_word_embeddings:
        pieces["lm_head.weight"] = embedding
        if not (keep and tensors[embedding[0]].packed):  # a quantised lm_head of its own is faster
            del pieces["lm_head.weight"]
    names = [name for hf in pieces.values() for name in hf]  # in the order of the file
    missing = [name for name in names if name not in tensors]
    unknown = [name for name in tensors if name not in names and not name.endswith("rotary_emb.inv_freq")]
    if missing or unknown:
        raise ValueError(f"config.json does not fit the weights: missing {missing[:4]}, not implemented {unknown[:4]}")
    conversion = Conversion(dtype or (plain_dtype(tensors[last_norm]) if keep else torch.bfloat16), keep)
    written = {}
    for ours, hf in pieces.items():
        like = wanted[ours]
        shapes = [tensors[name].shape for name in hf]
        if sum(map(math.prod, shapes)) != like.numel() or any(shape[1:] != like.shape[1:] for shape in shapes):
            raise ValueError(f"config.json does not fit the weights: {hf} of shapes {shapes} should make "
                             f"{list(like.shape)}")
        written |= conversion.like(ours, [tensors[name] for name in hf], like.shape)
    metadata = {"format": FORMAT, "source": source, "dtype": str(conversion.dtype).removeprefix("torch.")}
    if any(name.endswith(".data") for name in written):
        metadata |= {"mode": IMPORTED}
    data = (piece for ours, hf in pieces.items() for piece in conversion.pieces(ours, [tensors[name] for name in hf]))
    write_file(path, written, data, metadata, "converting")
    for line in conversion.summary():
        print(line, file=sys.stderr)


def convert(source: Path, out: Path, dtype: torch.dtype | None = torch.bfloat16, name: str | None = None) -> None:
    """Convert `source`, a Hugging Face folder or a .gguf file, to the folder `out`, with all weights in `dtype`. None:
    packed weights keep their integers, and where none are packed it is bfloat16.

    `name` goes into the metadata as the source (default: the name of the folder or file). Raises ValueError if anything
    is wrong; `out` is then as it was.
    """
    if out.resolve() == source.resolve():
        raise ValueError(f"{out}: the source itself would be overwritten; choose another --out")
    if not is_gguf(source):
        check_folder(source)
    with staged(out, source) as part:
        if is_gguf(source):
            metadata, tensors = open_gguf(source)
            raw = gguf_config(metadata, tensors, dtype or torch.bfloat16)
            config = Config.from_dict(raw)
            (part / "config.json").write_text(json.dumps(raw, indent=2))
            write_gguf_tokenizer(metadata, part)
        else:
            config = Config.load(source / "config.json")
            tensors = with_values(open_folder(source))
            for file in FILES & set(os.listdir(source)):
                shutil.copyfile(source / file, part / file)
            raw = read_json(part / "config.json")
        tensors = fold(tensors, raw, config)
        if config.tie_word_embeddings and "lm_head.weight" in tensors:
            lm_head = tensors.pop("lm_head.weight")
            embedding = tensors["model.embed_tokens.weight"]
            if not torch.equal(lm_head.read(), embedding.read()):  # the config is wrong: these are two matrices
                raw |= {"tie_word_embeddings": False}
                (part / "config.json").write_text(json.dumps(raw, indent=2))
                config = Config.load(part)
                tensors["lm_head.weight"] = lm_head
        write_weights(part / "model.safetensors", tensors, config, dtype, name or source.resolve().name)
        check(part, out)


# ----- As generate.py will load it ---------------------------------------------------------------------------------


def check(folder: Path, out: Path) -> None:
    """Load what was converted to `folder` as generate.py will load it from `out`. Raises ValueError or OSError where
    that fails, and says on stderr what works only in part. Of the weights, one layer is run and the rest is mapped."""
    config = Config.load(folder)
    check_layer(folder / "model.safetensors", config)
    remarks = []
    if not any((folder / name).exists() for name in TOKENIZERS):
        remarks.append("no tokenizer.json and no tokenizer.model: generate.py needs one of them there")
    else:
        tokenizer = Tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            beyond = [token for token, i in tokenizer.bpe.get_vocab().items() if i >= config.vocab_size]
            remarks.append(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: prompts with "
                           f"{', '.join(sorted(beyond)[:3])}{', ...' * (len(beyond) > 3)} will be refused")
        if tokenizer.has_chat_template:
            try:
                tokenizer.chat([{"role": "user", "content": "Hello"}])
            except ValueError as error:
                remarks.append(f"{error}; use --raw, or --chat_template FILE")
    for remark in remarks:
        print(f"{out}: {remark}".replace(f"{folder}/", ""), file=sys.stderr)


def check_layer(file: Path, config: Config) -> None:
    """Run the first layer on two tokens. Raises ValueError where the tensors do not fit or the result is not finite."""
    tensors, metadata = read_tensors(file)
    tensors = {name: tensor for name, tensor in tensors.items()
               if not name.startswith("layers.") or name.startswith("layers.0.")}
    if config.tie_word_embeddings and "lm_head.data" not in tensors:
        tensors["lm_head.weight"] = tensors["embed.weight"]
    with torch.device("meta"):
        model = Llama(replace(config, num_layers=1), qkv_bias="layers.0.wqkv.bias" in tensors)
    prepare_linears(model, tensors, *stored_mode(file, metadata, None))
    fill(model, tensors, file, "cpu", None)
    model.allocate_rope(2)
    with torch.inference_mode():
        features = model(torch.tensor([[0, config.vocab_size - 1]]), torch.arange(2))
    if not features.isfinite().all():
        raise ValueError("the first layer gives numbers that are not finite: the weights are damaged, or too large for "
                         "--dtype float16")


# ----- The command -------------------------------------------------------------------------------------------------


def work() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a Hugging Face folder, a hub id (ORG/NAME) or a .gguf file; or, to add a head, "
                        "a converted folder")
    parser.add_argument("--out", type=Path, help="the folder to write (default: checkpoints/ORG/NAME)")
    parser.add_argument("--eagle", metavar="ID_OR_DIR", help="also try out this draft head and copy it to "
                        "<out>/eagle, eagle3 or block, whichever kind it is")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="make plain numbers of all weights "
                        "(default: quantised ones stay as they are, others become bfloat16)")
    parser.add_argument("--token", help="hub token (default: the one from `hf auth login`)")
    args = parser.parse_args()
    watch_for_ctrl_c()
    source = fetch(args.source, args.token, is_target=True)
    head = fetch(args.eagle, args.token, is_target=False) if args.eagle is not None else None
    raise_on_ctrl_c()
    file = source / "model.safetensors"
    if file.is_file() and read_tensors(file)[1].get("format") == FORMAT:
        out = source  # only add the head
        if args.dtype or (args.out and args.out.resolve() != source.resolve()):
            raise ValueError(f"{source} is converted already: --out and --dtype are for a source that is not")
    else:
        name = name_of(source) if source == Path(args.source) else args.source
        if not (name or args.out):
            raise ValueError(f"{source}: nothing in this path names a model; choose the folder to write with --out")
        out = args.out or Path("checkpoints", name)
        convert(source, out, args.dtype and getattr(torch, args.dtype), name)
    if head:
        add_head(head, out)
    print(out)


def main() -> None:
    run_command(work)


if __name__ == "__main__":
    main()
