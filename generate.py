"""Generate text with a Llama, one sequence on one device, as fast as it goes; with EAGLE-2 the same text faster.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --compare \\
        --prompt "Write a Python function that checks whether a word is a palindrome."

This file is the command line; engine.py decodes. Weights of 8 or 4 bits: --checkpoint DIR/model-int8.safetensors, which
quantize.py writes, or --quantize int8.

Text goes to stdout as it is written, statistics to stderr; with --json the last line of stdout is one object.
"""
import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch

from autotree import curve_path, fit, profile_key, read_curve
from draft import Eagle1, Eagle2, EagleHead, find_head, load_head
from engine import Engine, Sampling, Vanilla
from model import Llama, load_model
from quantizers import GROUPS, MODES
from timing import device_name
from tokenizer import Tokenizer

GPU_TREE = (60, 6, 10)  # tokens, depth, topk of the paper; see autotree.py
CPU_TREE = (8, 3, 3)  # where width is not free; see BENCHMARKS.md
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(engine: Engine, ids: list[int], max_new_tokens: int, sampling: Sampling, tokenizer: Tokenizer,
        show: bool = False) -> dict:
    """One generation, timed. Returns the object that --json prints; `show` streams the text to stdout."""
    stream, tokens, gained = tokenizer.stream(), [], []
    start = time.perf_counter()
    for new in engine.generate(ids, max_new_tokens, sampling):
        if tokens:
            gained.append(len(new))
        else:
            first = time.perf_counter()  # reading `new` back waited for the device
        tokens += new
        if show:
            print(stream.push(new), end="", flush=True)
    end = time.perf_counter()
    if show:
        print(stream.flush(), flush=True)
    cuda = engine.device.type == "cuda"
    if tokens[-1] in tokenizer.stop_ids:
        stop = "eos"
    else:
        stop = "length" if len(tokens) == max_new_tokens else "context"
    depths = range(1, engine.drafter.max_depth + 1)
    return {
        "method": type(engine.drafter).__name__.lower(), "text": tokenizer.decode(tokens), "tokens": tokens,
        "prompt_tokens": len(ids), "new_tokens": len(tokens), "cycles": len(gained), "gained": gained,
        "mean_gained": sum(gained) / len(gained) if gained else 0.0,
        "accept_by_depth": [sum(g > d for g in gained) / max(len(gained), 1) for d in depths],
        "prefill_s": first - start, "decode_s": end - first,
        "tokens_per_sec": (len(tokens) - 1) / (end - first) if gained else 0.0, "compile_s": engine.compile_s,
        "memory_gb": (torch.cuda.max_memory_allocated() if cuda else
                      1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1e9,
        "device": device_name(engine.device),
        "dtype": str(engine.model.embed.weight.dtype).removeprefix("torch."), "torch": torch.__version__,
        "seed": sampling.seed, "stop": stop}


def report(result: dict) -> str:
    tree = "" if result["method"] == "vanilla" else (
        f", {result['mean_gained']:.2f} tokens a cycle; accepted by depth "
        + " ".join(f"{share:.0%}" for share in result["accept_by_depth"]))
    return (f"{result['method']}: {result['tokens_per_sec']:.1f} tokens/s ({result['new_tokens']} tokens, "
            f"{result['decode_s']:.2f} s{tree}); prompt of {result['prompt_tokens']} in {result['prefill_s']:.2f} s")


def compare(engine: Engine, vanilla: dict, fast: dict, ids: list[int]) -> str:
    """One line: the speed-up, and whether the tokens are the same; if not, how near a tie the first difference is."""
    a, b = fast["tokens"], vanilla["tokens"]
    speed_up = fast["tokens_per_sec"] / vanilla["tokens_per_sec"] if vanilla["tokens_per_sec"] else float("nan")
    if a == b:
        return f"{speed_up:.2f}x vanilla, identical tokens"
    at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    return (f"{speed_up:.2f}x vanilla; the tokens differ from number {at} on, where vanilla's two best tokens are "
            f"{engine.top2_gap(ids + b[:at]):.3g} apart ({vanilla['dtype']} rounding; float32 does not differ)")


def nodes(text: str) -> int | str:
    return text if text == "auto" else int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Generate text, with or without EAGLE-2.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    method = p.add_mutually_exclusive_group()
    method.add_argument("--eagle2", action="store_true", help="draft with EAGLE-2's dynamic tree")
    method.add_argument("--eagle", action="store_true", help="draft with EAGLE's fixed tree")
    p.add_argument("--draft", type=Path, help="draft head: its folder, or a file in it (default: <checkpoint>/eagle, "
                   "of which the file with the name of the model's)")
    p.add_argument("--quantize", choices=MODES, help="quantise target and draft head on load (better: quantize.py)")
    p.add_argument("--group", type=int, choices=GROUPS, help="columns that share a scale, with int4 (default: 128)")
    p.add_argument("--prompt", required=True, help="the text, - for stdin, or @FILE")
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top_k", type=int, default=0, help="0: off")
    p.add_argument("--top_p", type=float, default=1.0, help="1: off")
    p.add_argument("--min_p", type=float, default=0.0, help="0: off")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same text with any drafter")
    p.add_argument("--compare", action="store_true", help="run vanilla too and compare speed and tokens")
    p.add_argument("--draft_vocab", type=int, help="draft only so many of the head's frequent tokens; 0: all")
    p.add_argument("--draft_tokens", type=nodes, help="nodes of EAGLE-2's tree, the root included; auto: as many, and "
                   "levels, as are fastest with this head on this device (default on a GPU, if the head says what it "
                   "gains)")
    p.add_argument("--draft_depth", type=int, help="levels of drafted tokens")
    p.add_argument("--draft_topk", type=int, help="nodes fed a level, and continuations of each")
    p.add_argument("--tree_table", action="store_true", help="--draft_tokens auto, and show what it compared")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the device is fast at it")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    p.add_argument("--max_seq_len", type=int, help="cache slots (default: the model's context, at most 4096)")
    p.add_argument("--no_compile", action="store_true", help="no CUDA graphs: launch every kernel from Python")
    p.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    args = p.parse_args(argv)
    shape = (args.draft_tokens, args.draft_depth, args.draft_topk)
    auto = args.tree_table or args.draft_tokens == "auto"
    for wrong, message in (
            ((any(shape) or args.tree_table) and not args.eagle2,
             "--draft_tokens, --draft_depth, --draft_topk and --tree_table shape --eagle2's tree"),
            (args.tree_table and args.draft_tokens not in (None, "auto"), "--tree_table is for --draft_tokens auto"),
            (auto and any(shape[1:]), "--draft_tokens auto chooses depth and top-k too"),
            ((args.draft or args.compare or args.draft_vocab is not None) and not (args.eagle2 or args.eagle),
             "--draft, --draft_vocab and --compare need --eagle2 or --eagle"),
            ((args.draft_vocab or 0) < 0, "--draft_vocab must be 0 or more"),
            (args.group and args.quantize != "int4", "--group is for --quantize int4; a quantised file has its own"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.max_seq_len is not None and args.max_seq_len < 2, "--max_seq_len must be at least 2"),
            (not 0 <= args.temperature < float("inf"), "--temperature must be 0 or more"),
            (args.temperature == 0 and (args.top_k, args.top_p, args.min_p) != (0, 1.0, 0.0),
             "--top_k, --top_p and --min_p need a --temperature above 0"),
            (args.top_k < 0 or not 0 < args.top_p <= 1 or not 0 <= args.min_p <= 1,
             "--top_k must be 0 or more, --top_p in (0, 1], --min_p in [0, 1]"),
            (not -2**63 <= args.seed < 2**63, "--seed must fit 64 bits"),
            (args.device == "cuda" and not torch.cuda.is_available(),
             "--device cuda, but torch finds no CUDA device (torch.cuda.is_available() is false)")):
        if wrong:
            p.error(message)
    return args


def tree_shape(args: argparse.Namespace, model: Llama, head: EagleHead, draft: Path, max_seq_len: int
               ) -> tuple[int, int, int]:
    """Tokens, depth and top-k of EAGLE-2's tree: as asked for, else what fits, else the device's default."""
    cuda, asked = model.embed.weight.is_cuda, (args.draft_tokens, args.draft_depth, args.draft_topk)
    default = GPU_TREE if cuda else CPU_TREE
    known = cuda and not any(asked) and not args.no_compile and curve_path(draft).is_file()
    if known or args.tree_table or args.draft_tokens == "auto":
        key = profile_key(model, head, (args.checkpoint, draft), args.quantize, args.group)
        return fit(model, head, read_curve(draft), max_seq_len, key, args.tree_table) or default
    return tuple(given or usual for given, usual in zip(asked, default))


def load(args: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    """The engine that the command line describes. Raises ValueError or OSError with one line to show."""
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 halves the bytes; a CPU without instructions for it (x86: AVX512-BF16 or AMX) emulates it slowly
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    default = "bfloat16" if fast_bf16 else "float16" if device == "cuda" else "float32"
    how = (args.quantize, args.group or 128)
    model = load_model(args.checkpoint, device, DTYPES[args.dtype or default], *how)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}")
    max_seq_len = args.max_seq_len or min(model.cfg.max_position_embeddings, model.cfg.sliding_window or 4096, 4096)
    drafter = Vanilla(device)
    if args.eagle2 or args.eagle:
        draft = args.draft or find_head(args.checkpoint)
        head = load_head(draft, model, args.draft_vocab, *how)
        drafter = Eagle1(head, model) if args.eagle else Eagle2(
            head, model, *tree_shape(args, model, head, draft, max_seq_len))
    return Engine(model, drafter, max_seq_len, tokenizer.stop_ids, not args.no_compile), tokenizer


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    if args.prompt.startswith("@"):
        text = Path(args.prompt[1:]).read_text(encoding="utf-8")
    else:
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise ValueError("--prompt is empty")
    if args.raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    return tokenizer.chat([{"role": "user", "content": text}])


def main() -> None:
    args = parse_args()
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    try:
        engine, tokenizer = load(args)
        ids = read_prompt(args, tokenizer)
        engine.check(ids)
    except (ValueError, OSError) as e:
        sys.exit(fail(e))
    engine.warm_up(sampling)
    result = run(engine, ids, args.max_new_tokens, sampling, tokenizer, show=True)
    print(report(result), file=sys.stderr)
    if args.compare:
        plain = Engine(engine.model, Vanilla(engine.device), engine.max_seq_len, tokenizer.stop_ids,
                       not args.no_compile)
        plain.warm_up(sampling)
        result["vanilla"] = run(plain, ids, args.max_new_tokens, sampling, tokenizer)
        result["identical"] = result["tokens"] == result["vanilla"]["tokens"]
        print(report(result["vanilla"]), compare(plain, result["vanilla"], result, ids), sep="\n", file=sys.stderr)
    if args.json:
        print(json.dumps(result))


def fail(error: Exception) -> int:
    """One line on stderr; the exit code for bad input is 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
