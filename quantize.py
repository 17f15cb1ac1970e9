"""Write a quantised model file beside a converted checkpoint's own.

    python quantize.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --mode int8
    python quantize.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --mode int8 --draft
    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model-int8.safetensors --eagle2 ...

int8 and int8dyn take one tensor at a time. int4 wants to know what the layers' inputs look like, and asks the model: it
writes some thousand words of its own, beginning from nothing, and these run through the layers one after the other. Two
copies of them do: one through the layers as they were, one through what has been quantised so far. A layer's new
weights are to make of the latter what the old ones made of the former, halfway: the rest of the way is noise of this
text. Then GPTQ (quantizers.py). The embedding, norms and biases stay as they are, in any mode.
"""
import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.options import fail
from draft import load_head
from formats.weights import FORMAT, read_tensors, write_file
from model import Layer, Llama, load_model, rope_table
from ops.linear import linear
from ops.quantized import Quantized
from quant.linear import GROUPS, MODES, QuantizedLinear, mode_of, quantize_linears, quantize_weight, stored_mode
from tokenizer import Tokenizer

TEXTS, LENGTH, TOGETHER = 32, 512, 8  # that the model writes, tokens of each, how many are written or read at once


def quantize_checkpoint(folder: Path, mode: str, group: int, device: str) -> Path:
    """Write model-MODE.safetensors beside the model file of a folder, or beside this file, which it is made from.
    ValueError or OSError says what is wrong; nothing is left behind then."""
    model, metadata = open_model(folder, mode)
    with torch.device("meta"):
        shapes = Llama(model.cfg, qkv_bias=model.layers[0].wqkv.bias is not None)
    quantize_linears(shapes, mode, group)
    made = calibrated(model, folder, group, device) if mode == "int4" else one_by_one(model, mode, group, device)
    return write_quantized(folder, model.state_dict(), shapes.state_dict(), made, metadata, mode, group)


def quantize_draft(head: Path, checkpoint: Path, mode: str, group: int) -> Path:
    """The same for a draft head, which is small: on the CPU, and int4 without a text."""
    eagle = load_head(head, open_model(checkpoint, mode)[0], 0, mode, group)
    tensors = eagle.state_dict()
    return write_quantized(head, tensors, tensors, (), {"format": FORMAT}, mode, group)


def open_model(path: Path, mode: str) -> tuple[Llama, dict[str, str]]:
    """A checkpoint, memory-mapped: its tensors are read when they are used. And its metadata."""
    file = path if path.is_file() else path / "model.safetensors"
    metadata = read_tensors(file)[1] if file.is_file() else {}
    stored_mode(file, metadata, mode)
    return load_model(path), metadata


def write_quantized(folder: Path, tensors: dict[str, Tensor], like: dict[str, Tensor], made: Iterator[Quantized],
                    metadata: dict[str, str], mode: str, group: int) -> Path:
    """The tensors named in `like`, all from `tensors`, but integers and scales that are not there as they are `made`,
    in this order."""
    folder = folder if folder.is_dir() else folder.parent
    path, part = folder / f"model-{mode}.safetensors", folder / f"model-{mode}.part"
    like = {name: t if name.endswith((".data", ".scale")) else tensors[name] for name, t in like.items()}

    def pieces() -> Iterator[Tensor]:
        for name in like:
            if name in tensors:
                yield tensors[name]
            elif name.endswith(".data"):
                weight = next(made)
                yield weight.data
            else:
                yield weight.scale

    try:
        write_file(part, like, pieces(), metadata | {"mode": mode, "group": str(group if mode == "int4" else 0)}, mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def one_by_one(model: nn.Module, mode: str, group: int, device: str) -> Iterator[Quantized]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield quantize_weight(module.weight.to(device), mode_of(name, mode), group)


@torch.inference_mode()
def calibrated(model: Llama, path: Path, group: int, device: str) -> Iterator[Quantized]:
    """int4: the linears of one layer after the other, then the lm_head."""
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    length = min(LENGTH, model.cfg.max_position_embeddings, model.cfg.sliding_window or LENGTH)
    start, tokenizer = time.perf_counter(), Tokenizer(path if path.is_dir() else path.parent)
    writer = load_model(path, device, dtype, "int8" if cuda else None)  # int8 is as good and fits where int4 will
    text = torch.cat([write_text(writer, first_token(tokenizer), TOGETHER, length, seed)
                      for seed in range(TEXTS // TOGETHER)])
    del writer
    print(f"{text.numel()} tokens written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    now = F.embedding(text, model.embed.weight.to(device, dtype))
    meant, rope = now.clone(), rope_table(model.cfg, length, torch.device(device)).to(dtype)
    for layer in model.layers:
        yield from quantize_layer(copy.deepcopy(layer).to(device, dtype), now, meant, rope, group)
    yield quantize_weight(model.lm_head.weight.to(device), mode_of("lm_head", "int4"))


def first_token(tokenizer: Tokenizer) -> int:
    """What stood between texts when the model learned to write."""
    between = tokenizer.bpe.token_to_id("<|endoftext|>")
    ids = (between, tokenizer.bos_id, *sorted(tokenizer.stop_ids), 0)
    return next(i for i in ids if i is not None)


@torch.inference_mode()
def write_text(model: Llama, first: int, rows: int, length: int, seed: int) -> Tensor:
    """[rows, length] ids, sampled as the model has them, at temperature 1."""
    device = model.embed.weight.device
    model.free_cache()  # of another text: it is large
    model.allocate_cache(length, -length % 64, rows)
    random, text = torch.Generator(device).manual_seed(seed), torch.full((rows, length), first, device=device)
    for i in range(length - 1):
        at = torch.tensor([i], device=device)
        mask = torch.arange((i // 64 + 1) * 64, device=device)[None] <= at
        logits = linear(model(text[:, i:i + 1], at, at, mask)[:, 0], model.lm_head.weight, dtype=torch.float32)
        text[:, i + 1] = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
    return text


def quantize_layer(old: Layer, now: Tensor, meant: Tensor, rope: Tensor, group: int, share: float = 0.5,
                   damp: float = 0.05) -> Iterator[Quantized]:
    """The four linears of a layer. What reaches it, as quantised so far and as it was, `now` and `meant` [texts, T, C],
    become what leaves it.

    With inputs a, and b as they were, new weights v that best make v a + now equal w b + meant solve
    (v - w) a a' = (w (b - a) + meant - now) a'; `share` of the way to them is gone."""
    new = copy.copy(old)
    new._modules = dict(old._modules)  # the same norms, but linears of its own
    for name in ("wqkv", "wo", "w13", "w2"):
        was = getattr(old, name)
        w, adds = was.weight.float(), name in ("wo", "w2")
        hessian, rhs = w.new_zeros(w.shape[1], w.shape[1]), w.new_zeros(w.shape[1], w.shape[0])
        seen = [(inputs(new, name, x, rope), inputs(old, name, y, rope))
                for x, y in zip(now.split(TOGETHER), meant.split(TOGETHER))]
        for (a, b), x, y in zip(seen, now.split(TOGETHER), meant.split(TOGETHER)):
            a, b = a.float().flatten(0, 1), b.float().flatten(0, 1)
            off = (b - a) @ w.T
            off = off + (y - x).float().flatten(0, 1) if adds else off
            hessian.addmm_(a.T, a)
            rhs.addmm_(a.T, off)
        hessian /= now.shape[0] * now.shape[1]
        rhs /= now.shape[0] * now.shape[1]
        H = hessian.clone()
        H.diagonal().add_(damp * hessian.diagonal().mean() + 1e-30)
        target = w + share * torch.cholesky_solve(rhs, torch.linalg.cholesky(H)).T
        del H, rhs
        weight = quantize_weight(target, "int4", group, hessian)
        setattr(new, name, QuantizedLinear(weight, was.bias))
        for (a, b), x, y in zip(seen, now.split(TOGETHER), meant.split(TOGETHER)):
            if adds:  # x and y are views
                x += linear(a, weight)
                y += linear(b, was.weight)
        yield weight


def inputs(layer: Layer, name: str, x: Tensor, rope: Tensor) -> Tensor:
    """What a linear of the layer is given; x [texts, T, C] reaches the layer, or for the last two its second half."""
    if name == "wqkv":
        return x if layer.attn_norm is None else layer.attn_norm(x)
    if name == "wo":
        return layer.attention(x, rope, None, None, None)
    if name == "w13":
        return layer.mlp_norm(x)
    return linear(x, layer.w13.weight, norm=(layer.mlp_norm.weight, layer.mlp_norm.eps), gated=True)


def main() -> None:
    p = argparse.ArgumentParser(description="Quantise a converted checkpoint, or its draft head.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder")
    p.add_argument("--mode", choices=MODES, required=True)
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--draft", type=Path, nargs="?", const=True,
                   help="the draft head in this folder instead (default: <checkpoint>/eagle)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    for wrong, message in (
            (args.group and args.mode in ("int8", "int8dyn"), "--group is for int4"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda, but torch finds no CUDA device")):
        if wrong:
            p.error(message)
    group = args.group or 128
    try:
        if args.draft is not None:
            head = args.checkpoint / "eagle" if args.draft is True else args.draft
            print(quantize_draft(head, args.checkpoint, args.mode, group))
        else:
            print(quantize_checkpoint(args.checkpoint, args.mode, group, args.device))
    except (ValueError, OSError) as e:
        sys.exit(fail(e))


if __name__ == "__main__":
    main()
