"""How many bytes a model, its cache and its drafter take, and what to do where a device has not as many.

The arithmetic is that of the loaders, on the meta device: the same modules with nothing in them. Exact for weights,
cache and EAGLE head; for what kernels and graphs need beside them a bound.

    python memory.py --checkpoint checkpoints/ORG/NAME --eagle2 --quantize int8 --max_seq_len 4096
"""
import argparse
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from app.options import context, placement
from draft import EagleHead
from engine import SPARE
from formats.config import Config
from formats.eagle import VOCAB, find_head, folder_of, read_vocab
from formats.weights import read_tensors
from model import Llama
from quant.linear import ROWS, quantize_linears, stored_mode

OVERHEAD = 0.5e9  # cuBLAS, graphs, the activations of a prefill's chunk


class Need(NamedTuple):
    """Bytes. `passing` is what a prefill takes for a while, `loading` what quantising takes before there is a cache."""
    weights: int
    cache: int
    drafter: int
    passing: int
    loading: int

    @property
    def total(self) -> int:
        return self.weights + max(self.cache + self.drafter + self.passing, self.loading)


def exhausted(error: BaseException) -> bool:
    """Whether this is the device's, or the machine's, memory at its end: PyTorch, cuBLAS and Triton each say it in
    another way, and an error while a graph is captured may stand in front of it."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    behind = error.__cause__ or error.__context__
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts) or (
        behind is not None and exhausted(behind))


def nbytes(tensors: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Of distinct tensors: floating-point parameters as `dtype`, all else as it is."""
    return sum(t.numel() * dtype.itemsize if isinstance(t, nn.Parameter) else t.nbytes for t in tensors)


def content(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def weight_bytes(cfg: Config, dtype: torch.dtype, mode: str | None = None, group: int = 128, qkv_bias: bool = False
                 ) -> int:
    """Of a target as load_model leaves it. A tied lm_head is quantised on its own, and takes bytes of its own then."""
    with torch.device("meta"):
        model = Llama(cfg, qkv_bias=qkv_bias)
    if mode:
        quantize_linears(model, mode, group)
    return nbytes(content(model), dtype)


def cache_bytes(cfg: Config, max_seq_len: int, dtype: torch.dtype, layers: int | None = None) -> int:
    """Keys and values, and the table of RoPE, of all slots."""
    of_keys = (cfg.num_layers if layers is None else layers) * cfg.num_kv_heads
    return 2 * (max_seq_len + SPARE) * (of_keys + 1) * cfg.head_dim * dtype.itemsize


def eagle_bytes(cfg: Config, target: Config, max_seq_len: int, dtype: torch.dtype, mode: str | None = None,
                group: int = 128, ids: int | None = None) -> int:
    """Of a head and of what Eagle makes of it: the embeddings' table; the lm_head's rows that are drafted from, where
    these are not the target's own; and a copy of half of fc, where it is not read as the head has it. `ids`: how many
    tokens are drafted (None: all)."""
    with torch.device("meta"):
        head = EagleHead(cfg)
    size, one = cfg.hidden_size, dtype.itemsize
    if mode:
        head.quantize(mode, group)
    row, copied = size + 4 if mode else size * one, not mode or (ids is not None and mode != "int4")
    tables = target.vocab_size * size * one + copied * size * row
    rows = (ids or 0) * row
    return nbytes(content(head), dtype) + tables + rows + cache_bytes(cfg, max_seq_len, dtype, 1)


def passing(cfg: Config, dtype: torch.dtype, mode: str | None) -> int:
    """The widest matrix of a quantised model for prefill, no longer quantised, and OVERHEAD."""
    return int(OVERHEAD) + (widest(cfg, dtype) if mode else 0)


def loading(cfg: Config, dtype: torch.dtype, mode: str | None) -> int:
    """A matrix, and ROWS rows of the deepest one in fp32, as often as quantizers.py holds them at once: 3 times, and
    5 times where int4 is searched for."""
    deepest = max(cfg.intermediate_size, cfg.num_heads * cfg.head_dim, cfg.hidden_size)
    return ({"int4": 6}.get(mode, 4) * 4 * ROWS * deepest + widest(cfg, dtype)) if mode else 0


def widest(cfg: Config, dtype: torch.dtype) -> int:
    return max(cfg.vocab_size, 2 * cfg.intermediate_size) * cfg.hidden_size * dtype.itemsize


def plan(args: argparse.Namespace, dtype: torch.dtype, max_seq_len: int, mode: str | None) -> Need:
    """Of what generate.py's command line asks for, with this cache and these weights."""
    folder, group = folder_of(args.checkpoint), args.group or 128
    cfg, file = Config.load(folder), args.checkpoint if args.checkpoint.is_file() else folder / "model.safetensors"
    tensors, metadata = read_tensors(file)
    stored, stored_group = stored_mode(file, metadata, None)
    mode, group = (stored, stored_group or 128) if stored else (mode, group)
    drafter = 0
    if args.method.startswith("eagle"):
        path = args.draft or find_head(args.checkpoint)
        head, vocab = folder_of(path), args.draft_vocab
        listed = vocab != 0 and (head / VOCAB).is_file()
        eagle = Config.load(head, model_type="llama")
        ids = len(read_vocab(head / VOCAB, eagle.vocab_size, vocab)) if listed else None
        drafter = eagle_bytes(eagle, cfg, max_seq_len, dtype, mode, group, ids)
    elif given := args.medusa or args.speculate:
        drafter = given.stat().st_size if given.is_file() else max(
            (file.stat().st_size for file in given.iterdir() if file.suffix in (".safetensors", ".pt")), default=0)
    return Need(weight_bytes(cfg, dtype, mode, group, "layers.0.wqkv.bias" in tensors),
                cache_bytes(cfg, max_seq_len, dtype), drafter, passing(cfg, dtype, mode),
                loading(cfg, dtype, None if stored else mode))


def free_bytes(device: str) -> int:
    """What this process could have if it gave back all that it holds."""
    if device != "cuda":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), int(total * torch.cuda.get_per_process_memory_fraction()))


def advice(args: argparse.Namespace, device: str, dtype: torch.dtype, max_seq_len: int, free: int | None = None) -> str:
    """One line: what was needed, what there is, and what would fit."""
    free = free_bytes(device) if free is None else free
    need, file = plan(args, dtype, max_seq_len, args.quantize), args.checkpoint.is_file()
    modes = [] if file or args.quantize == "int4" else [m for m in ("int8", "int4") if m != args.quantize]
    lengths = [2**n for n in range(16, 7, -1) if 2**n < max_seq_len]
    kinds = ([(f"--quantize {mode}", mode, max_seq_len) for mode in modes],
             [(f"--max_seq_len {slots}", args.quantize, slots) for slots in lengths],
             [(f"--quantize {mode} --max_seq_len {slots}", mode, slots) for mode in modes for slots in lengths])
    fits = []
    for ways in kinds:  # the first of each kind that fits; both together where neither does alone
        found = ((flag, plan(args, dtype, slots, mode).total) for flag, mode, slots in ways)
        if not fits or ways is not kinds[-1]:
            fits += [f"{flag} ({total / 1e9:.1f} GB)" for flag, total in found if total < min(free, need.total)][:1]
    ways = " fits, as does ".join(fits) + " fits" * (len(fits) == 1)
    name = args.checkpoint.parent.name if file else args.checkpoint.resolve().name
    parts = [f"{need.weights / 1e9:.1f} GB of weights", f"{need.cache / 1e9:.1f} GB of cache for {max_seq_len} slots",
             *([f"{need.drafter / 1e9:.1f} GB for drafting"] if need.drafter else ()),
             f"about {need.passing / 1e9:.1f} GB in passing"]
    gpu, machine = ("GPU ", "GPU") if device == "cuda" else ("", "machine")
    return (f"out of {gpu}memory: {name} in {args.quantize or str(dtype).removeprefix('torch.')} needs "
            f"{', '.join(parts)}; the {machine} has {free / 1e9:.1f} GB free: " + (ways or (
                "a smaller model would fit" if need.total > free else "something else took it meanwhile")))


def main() -> None:
    import generate  # which imports this file

    args = generate.parse_args([*sys.argv[1:], "--prompt", "-"])
    device, dtype = placement(args)
    need = plan(args, dtype, context(args, Config.load(folder_of(args.checkpoint))), args.quantize)
    print(", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in need._asdict().items()),
          f"{need.total / 1e9:.2f} GB of {free_bytes(device) / 1e9:.2f} GB free", sep="; ")


if __name__ == "__main__":
    main()
