"""How many bytes a model, its cache and its drafter take, and what to do where a device has fewer.

Weights, cache and drafter are built on PyTorch's meta device, which has shapes but no memory, and their bytes are added
up: exact, and right for a new drafter too. For what kernels and graphs need besides there is an upper bound.

    python generate.py --checkpoint checkpoints/ORG/NAME --eagle2 --quantize int8 --max_seq_len 4096 --memory
"""
import argparse
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from draft import Drafter
from drafters.methods import make_drafter
from engine import SPARE
from formats.config import Config
from formats.eagle import folder_of
from formats.weights import read_metadata, read_tensors
from model import Llama
from ops import cpu_integers, cpu_kernels
from ops.quantized import AT_ONCE, Quantized
from quant.linear import ROWS, QuantizedLinear, prepare_linears, quantize_linears, stored_mode

OVERHEAD = 0.5e9  # cuBLAS, CUDA graphs, the activations of a chunk of the prompt


class Need(NamedTuple):
    """The memory that a run needs, in bytes."""
    weights: int
    cache: int
    drafter: int
    passing: int  # temporary, of a prefill; on a CPU also the second copies of int8 weights (copied_bytes)
    loading: int  # temporary, of quantising on load, before the cache is allocated

    @property
    def total(self) -> int:
        return self.weights + max(self.cache + self.drafter + self.passing, self.loading)


def exhausted(error: BaseException) -> bool:
    """True if the error, or the one behind it, means that the GPU or the machine is out of memory. PyTorch,
    cuBLAS and Triton word it differently; during the capture of a CUDA graph another error may hide it."""
    texts = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    behind = error.__cause__ or error.__context__
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts) or (
        behind is not None and exhausted(behind))


def inside(thing: object, seen: set[int] | None = None) -> Iterator[object]:
    """An object, its attributes, their items and so on, each once."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, ModuleType, FunctionType, str)):
        return
    seen.add(id(thing))
    yield thing
    if isinstance(thing, dict):
        parts = thing.values()
    elif isinstance(thing, (list, tuple)):
        parts = thing
    else:
        parts = () if isinstance(thing, Tensor) else (getattr(thing, "__dict__", ()),)
    for part in parts:
        yield from inside(part, seen)


def storages(thing: object) -> dict[int, int]:
    """Bytes of each storage in `thing`, by its identity."""
    tensors = (part for part in inside(thing) if isinstance(part, Tensor))
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def total_bytes(thing: object, besides: object = None) -> int:
    """Bytes of the distinct storages in `thing` that `besides` does not hold too."""
    others = storages(besides)
    return sum(size for identity, size in storages(thing).items() if identity not in others)


def copied_bytes(thing: object, dtype: torch.dtype) -> int:
    """Bytes of the int8 weights in `thing` that a CPU keeps a second time, in FBGEMM's order: those that our kernels do
    not take with activations of `dtype`."""
    if not cpu_integers.is_supported():
        return 0
    weights = [part.weight if isinstance(part, QuantizedLinear) else part for part in inside(thing)]
    return sum({id(w.data): w.data.nbytes for w in weights if isinstance(w, Quantized) and not w.group
                and not (dtype == torch.float32 and cpu_kernels.takes_weight(w))}.values())


def empty_model(cfg: Config, dtype: torch.dtype, mode: str | None = None, group: int = 128, qkv_bias: bool = False
                ) -> Llama:
    """A target as load_model leaves it, on the meta device. A tied lm_head is quantised on its own and
    takes bytes of its own then."""
    with torch.device("meta"):
        model = Llama(cfg, qkv_bias=qkv_bias)
    if mode:
        quantize_linears(model, mode, group)
    return model.to(dtype)


def stored_model(file: Path, dtype: torch.dtype, mode: str | None = None, group: int = 128) -> Llama:
    """The target in a model file as load_model leaves it, on the meta device. mode, group: how it is quantised on load
    if the file is not quantised."""
    tensors, metadata = read_tensors(file)
    with torch.device("meta"):
        model = Llama(Config.load(file.parent), qkv_bias="layers.0.wqkv.bias" in tensors)
    stored, stored_group = stored_mode(file, metadata, None)
    prepare_linears(model, tensors, stored or mode, stored_group if stored else group)
    return model.to(dtype)


def cache_bytes(cfg: Config, max_seq_len: int, dtype: torch.dtype) -> int:
    """Keys, values and the RoPE table of all slots."""
    planes = cfg.num_layers * cfg.num_kv_heads + 1
    return 2 * (max_seq_len + SPARE) * planes * cfg.head_dim * dtype.itemsize


def empty_drafter(args: argparse.Namespace, model: Llama, max_seq_len: int, mode: str | None = None,
                  device: str = "cuda") -> Drafter:
    """--method's drafter with its cache and what it makes of its weights on this device, for a model on the meta
    device."""
    tree = None if args.draft_tokens == "auto" else args.draft_tokens  # to choose one is to measure
    asked = {**vars(args), "quantize": mode, "device": device, "draft_tokens": tree, "tree_table": None}
    drafter = make_drafter(args.method, argparse.Namespace(**asked), model, max_seq_len)
    drafter.allocate(max_seq_len + SPARE)
    return drafter


def passing(cfg: Config, dtype: torch.dtype, mode: str | None) -> int:
    """What a prefill needs for a while: weights of a quantised model in floating point, and OVERHEAD."""
    return int(OVERHEAD) + (dequantized(cfg, dtype) if mode else 0)


def loading(cfg: Config, dtype: torch.dtype, mode: str | None) -> int:
    """What quantising on load needs for a while: the widest matrix, and ROWS rows of the deepest one in fp32, 4 times
    at once, 6 times where int4 scales are searched for (quant/linear.py)."""
    deepest = max(cfg.intermediate_size, cfg.num_heads * cfg.head_dim, cfg.hidden_size)
    copies = 6 if mode == "int4" else 4
    return copies * 4 * ROWS * deepest + widest(cfg, dtype) if mode else 0


def dequantized(cfg: Config, dtype: torch.dtype) -> int:
    """Bytes of the weights of a quantised model that are in floating point at the same time."""
    return min(widest(cfg, dtype), AT_ONCE * dtype.itemsize)


def widest(cfg: Config, dtype: torch.dtype) -> int:
    return max(cfg.vocab_size, 2 * cfg.intermediate_size) * cfg.hidden_size * dtype.itemsize


def plan(args: argparse.Namespace, dtype: torch.dtype, max_seq_len: int, mode: str | None, device: str = "cuda"
         ) -> Need:
    """What generate.py's options need, with this cache and quantised to this mode on load."""
    folder = folder_of(args.checkpoint)
    cfg = Config.load(folder)
    file = args.checkpoint if args.checkpoint.is_file() else folder / "model.safetensors"
    stored, _ = stored_mode(file, read_metadata(file), None)
    model = stored_model(file, dtype, mode, args.group or 128)
    on_load = None if stored else mode
    drafter = empty_drafter(args, model, max_seq_len, on_load, device)
    copies = copied_bytes((model, drafter), dtype) if device == "cpu" else 0
    return Need(total_bytes(model), cache_bytes(cfg, max_seq_len, dtype), total_bytes(drafter, besides=model),
                passing(cfg, dtype, stored or mode) + copies, loading(cfg, dtype, on_load))


def free_bytes(device: str) -> int:
    """Bytes that can still be allocated. On a GPU, also what PyTorch's allocator holds and would use again. On a CPU,
    also the page cache, which the kernel gives up: after a download nearly all memory is page cache."""
    if device != "cuda":
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    free, total = torch.cuda.mem_get_info()
    return min(free + torch.cuda.memory_reserved(), int(total * torch.cuda.get_per_process_memory_fraction()))


def advice(args: argparse.Namespace, device: str, dtype: torch.dtype, max_seq_len: int, free: int | None = None) -> str:
    """One line: what was needed, what there is, and what would fit."""
    free = free_bytes(device) if free is None else free
    need, file = plan(args, dtype, max_seq_len, args.quantize, device), args.checkpoint.is_file()
    modes = [] if file or args.quantize == "int4" else [m for m in ("int8", "int4") if m != args.quantize]
    lengths = [2**n for n in range(16, 7, -1) if 2**n < max_seq_len]
    kinds = ([(f"--quantize {mode}", mode, max_seq_len) for mode in modes],
             [(f"--max_seq_len {slots}", args.quantize, slots) for slots in lengths],
             [(f"--quantize {mode} --max_seq_len {slots}", mode, slots) for mode in modes for slots in lengths])
    fits = []
    for ways in kinds:  # the first of each kind that fits; both together where neither does alone
        found = ((flag, plan(args, dtype, slots, mode, device).total) for flag, mode, slots in ways)
        if not fits or ways is not kinds[-1]:
            fits += [f"{flag} ({total / 1e9:.1f} GB)" for flag, total in found if total < min(free, need.total)][:1]
    ways = " fits, as does ".join(fits) + " fits" * (len(fits) == 1)
    name = folder_of(args.checkpoint).resolve().name
    parts = [f"{need.weights / 1e9:.1f} GB of weights", f"{need.cache / 1e9:.1f} GB of cache for {max_seq_len} slots",
             *([f"{need.drafter / 1e9:.1f} GB for drafting"] if need.drafter else ()),
             f"about {need.passing / 1e9:.1f} GB of activations"]
    gpu, machine = ("GPU ", "GPU") if device == "cuda" else ("", "machine")
    return (f"out of {gpu}memory: {name} in {args.quantize or str(dtype).removeprefix('torch.')} needs "
            f"{', '.join(parts)}; the {machine} has {free / 1e9:.1f} GB free: " + (ways or (
                "a smaller model would fit" if need.total > free else "something else took it meanwhile")))


def summary(args: argparse.Namespace, device: str, dtype: torch.dtype, max_seq_len: int) -> str:
    """One line for --memory."""
    need = plan(args, dtype, max_seq_len, args.quantize, device)
    parts = [f"weights {need.weights / 1e9:.2f} GB", f"cache {need.cache / 1e9:.2f} GB",
             f"drafter {need.drafter / 1e9:.2f} GB", f"activations {need.passing / 1e9:.2f} GB"]
    if need.loading:
        parts[-1] += f"; before that, while it is quantised, {need.loading / 1e9:.2f} GB beside the weights"
    return f"{', '.join(parts)}: at most {need.total / 1e9:.2f} GB of {free_bytes(device) / 1e9:.2f} GB free"
