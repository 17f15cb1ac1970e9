"""Write a quantised model file beside a converted checkpoint's own.

    python quantize.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --mode int8
    python quantize.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --mode int8 --draft
    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct/model-int8.safetensors --eagle2 ...

int8 and int8dyn quantise one tensor after the other, without any text. int4 is calibrated: it needs to know what the
inputs of each layer look like. So the model first samples 32 texts of 512 tokens, each from one start token. They then
go through the layers twice, side by side: once through the original layers, once through those quantised so far.
The new weights of a layer map the quantised inputs half-way to the original outputs; going all the way overfits the
calibration text. GPTQ then rounds them (quant/int4.py). In all modes lm_head is int8; embedding, norms, biases stay.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft import EagleHead
from drafters.heads import Quantize, load_head
from formats.eagle import folder_of, open_head
from formats.weights import FORMAT, read_tensors, write_file
from formats.writing import locked, replace_files
from model import Layer, Llama, layer_ropes, load_model, rope_table
from ops.linear import linear
from ops.quantized import Quantized, in_rows
from quant.calibration import corrected_weight
from quant.linear import GROUPS, MODES, QuantizedLinear, mode_of, quantize_linears, quantize_weight, stored_mode
from tokenizer import Tokenizer

TEXTS = 32  # that the model writes for calibration
LENGTH = 512  # tokens of each
BATCH = 8  # texts that are written, or go through a layer, at a time


# ----- Files -------------------------------------------------------------------------------------------------------


def quantize_checkpoint(path: Path, mode: str, group: int, device: str) -> Path:
    """Write model-MODE.safetensors into the folder of a checkpoint, given by its folder or its model file. Returns the
    new file. Raises ValueError or OSError that says what is wrong; no file is left behind then."""
    model, metadata = open_model(path, mode)
    with torch.device("meta"):
        like = Llama(model.cfg, qkv_bias=model.layers[0].wqkv.bias is not None)
    quantize_linears(like, mode, group)
    if mode == "int4":
        weights = quantize_calibrated(model, path, group, device)
    else:
        weights = quantize_one_by_one(model, mode, group, device)
    return write_quantized(path, model.state_dict(), like.state_dict(), weights, metadata, mode, group)


def quantize_draft(head: Path, checkpoint: Path, mode: str, group: int) -> Path:
    """As quantize_checkpoint, for a draft head given by its folder or file. On the CPU; int4 is not calibrated."""
    stored_mode(*open_head(head, "EAGLE-1/2", "EAGLE-3", "block")[::2], mode)  # refuses one that is quantised already
    eagle = load_head(head, open_model(checkpoint, mode)[0], 0, Quantize(mode, group))
    tensors = eagle.state_dict()
    if not isinstance(eagle, EagleHead) and eagle.vocab is not None:
        tensors["d2t"] = eagle.vocab - torch.arange(len(eagle.vocab))  # as published: offsets
    return write_quantized(head, tensors, tensors, iter(()), {"format": FORMAT}, mode, group)


def open_model(path: Path, mode: str) -> tuple[Llama, dict[str, str]]:
    """A checkpoint and the metadata of its file. The tensors are memory-mapped: each is read when it is used."""
    file = path if path.is_file() else path / "model.safetensors"
    metadata = read_tensors(file)[1] if file.is_file() else {}
    stored_mode(file, metadata, mode)
    return load_model(path), metadata


def write_quantized(path: Path, tensors: dict[str, Tensor], like: dict[str, Tensor], weights: Iterator[Quantized],
                    metadata: dict[str, str], mode: str, group: int) -> Path:
    """Write model-MODE.safetensors into the folder of `path`. `like` names the tensors to write. Each comes from
    `tensors`, or if it is not there from the next one of `weights`, which come in the order of `like`."""
    file = folder_of(path) / f"model-{mode}.safetensors"
    like = {name: t if name.endswith((".data", ".scale")) else tensors[name] for name, t in like.items()}
    metadata = metadata | {"mode": mode, "group": str(group if mode == "int4" else 0)}

    def pieces() -> Iterator[Tensor]:
        for name in like:
            if name in tensors:
                yield tensors[name]
            elif name.endswith(".data"):
                weight = next(weights)
                yield in_rows(weight).data  # a CPU's kernels have put it into their own order
            else:  # .scale follows its .data
                yield weight.scale

    with replace_files(file.parent) as part:
        write_file(part / file.name, like, pieces(), metadata, mode)
    return file


# ----- Models ------------------------------------------------------------------------------------------------------


def quantize_one_by_one(model: nn.Module, mode: str, group: int, device: str) -> Iterator[Quantized]:
    """The weights of all linears, in the order of the state_dict, each quantised when it is asked for."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield quantize_weight(module.weight.to(device), mode_of(name, mode), group)


@torch.inference_mode()
def quantize_calibrated(model: Llama, path: Path, group: int, device: str) -> Iterator[Quantized]:
    """The weights of all linears, in the order of the state_dict: int4, calibrated; at last the lm_head, plain int8."""
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    length = min(LENGTH, model.cfg.max_position_embeddings, model.cfg.context_limit or LENGTH)
    first = first_token(Tokenizer(folder_of(path)))
    start = time.perf_counter()
    writer = load_model(path, device, dtype, "int8" if cuda else None)  # int8 writes as well, and needs less memory
    tokens = torch.cat([write_text(writer, first, BATCH, length, seed) for seed in range(TEXTS // BATCH)])
    del writer
    print(f"{tokens.numel()} tokens written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    original_x = F.embedding(tokens, model.embed.weight.to(device, dtype))
    quantized_x = original_x.clone()
    rope = rope_table(model.cfg, length, torch.device(device)).to(dtype)
    for layer, angles in zip(model.layers, layer_ropes(model.cfg, rope)):
        yield from quantize_layer(copy.deepcopy(layer).to(device, dtype), quantized_x, original_x, angles, group)
    yield quantize_weight(model.lm_head.weight.to(device), mode_of("lm_head", "int4"))


def first_token(tokenizer: Tokenizer) -> int:
    """What separated texts in training, if the model has it: <|endoftext|>, else bos, else a stop id, else 0."""
    separator = tokenizer.bpe.token_to_id("<|endoftext|>")
    candidates = (separator, tokenizer.bos_id, *sorted(tokenizer.stop_ids), 0)
    return next(i for i in candidates if i in tokenizer.model_ids)


@torch.inference_mode()
def write_text(model: Llama, first: int, batch: int, length: int, seed: int) -> Tensor:
    """Sample texts from the model at temperature 1, each beginning with the token `first`: [batch, length] int64."""
    device = model.embed.weight.device
    model.free_cache()  # before the new one is allocated: it is large
    model.allocate_cache(length, -length % 64, batch)
    random = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((batch, length), first, device=device)
    for i in range(length - 1):
        position = torch.tensor([i], device=device)
        mask = torch.arange((i // 64 + 1) * 64, device=device)[None] <= position
        features = model(tokens[:, i:i + 1], position, position, mask)[:, 0]
        logits = linear(features, model.lm_head.weight, dtype=torch.float32)
        tokens[:, i + 1] = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
    return tokens


# ----- One layer of int4 -------------------------------------------------------------------------------------------


def quantize_layer(old: Layer, quantized_x: Tensor, original_x: Tensor, rope: Tensor, group: int,
                   correction: float = 0.5, damp: float = 0.05) -> Iterator[Quantized]:
    """Quantise the four linears of a layer to int4, in the order wqkv, wo, w13, w2.

    quantized_x and original_x [texts, T, C] are the hidden states that reach the layer through the quantised and the
    original layers. Both are changed in place, to those that leave it. correction, damp: see corrected_weight.
    """
    new = copy.copy(old)
    new._modules = dict(old._modules)  # shares the norms; its linears are replaced one by one
    for name in ("wqkv", "wo", "w13", "w2"):
        original = getattr(old, name)
        hidden = list(zip(quantized_x.split(BATCH), original_x.split(BATCH)))  # views
        inputs = [(layer_input(new, name, x, rope), layer_input(old, name, y, rope)) for x, y in hidden]
        is_residual = name in ("wo", "w2")
        wanted, hessian = corrected_weight(original.weight.float(), inputs, hidden if is_residual else None,
                                           correction, damp)
        weight = quantize_weight(wanted, "int4", group, hessian)
        setattr(new, name, QuantizedLinear(weight, original.bias))
        if is_residual:
            for (a, b), (x, y) in zip(inputs, hidden):
                x += linear(a, weight)
                y += linear(b, original.weight)
        yield weight


def layer_input(layer: Layer, name: str, x: Tensor, rope: Tensor) -> Tensor:
    """The input of one linear of a layer. x [texts, T, C]: the hidden states that reach the layer, or for w13 and w2
    those that reach its MLP."""
    if name == "wqkv":
        return x if layer.attn_norm is None else layer.attn_norm(x)
    if name == "wo":
        return layer.attention(x, rope, None, None, None)
    if name == "w13":
        return layer.mlp_norm(x)
    return linear(x, layer.w13.weight, norm=(layer.mlp_norm.weight, layer.mlp_norm.eps), gated=True)


def main() -> None:
    p = argparse.ArgumentParser(description="Quantise a converted checkpoint, or its draft head.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    p.add_argument("--mode", choices=MODES, required=True, help="docs/quantization.md compares them")
    p.add_argument("--group", type=int, choices=GROUPS, help="int4: columns that share a scale (default: 128)")
    p.add_argument("--draft", type=Path, nargs="?", const=True,
                   help="quantise a draft head instead: the one in this folder (default: <checkpoint>/eagle)")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu",
                   help="where to compute (default: cuda if there is a GPU)")
    args = p.parse_args()
    if args.group and args.mode != "int4":
        p.error("--group is for int4")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda, but torch finds no CUDA device")
    source = {None: args.checkpoint, True: folder_of(args.checkpoint) / "eagle"}.get(args.draft, args.draft)
    with locked(folder_of(source)) if source.exists() else nullcontext():  # its weights stay those that are read
        print(quantize_checkpoint(source, args.mode, args.group or 128, args.device) if args.draft is None
              else quantize_draft(source, args.checkpoint, args.mode, args.group or 128))


if __name__ == "__main__":
    run_command(main)
