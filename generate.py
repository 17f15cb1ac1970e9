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
from collections.abc import Sequence
from pathlib import Path

import torch

import memory
from engine import Engine, Sampling, Vanilla
from methods import METHODS, add_options, check_options, make_drafter
from model import Config, load_model
from timing import device_name, run
from tokenizer import Tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def generate(engine: Engine, ids: list[int], max_new_tokens: int, sampling: Sampling, tokenizer: Tokenizer,
             method: str = "vanilla", show: bool = False, stops: Sequence[str] = ()) -> dict:
    """One generation, timed, to the first of the texts `stops` at most. Returns the object that --json prints; `show`
    streams the text to stdout."""
    stream = tokenizer.stream(stops)

    def take(new: list[int]) -> bool:
        text = stream.push(new) if show or stops else ""
        if show:
            print(text, end="", flush=True)
        return stream.stopped

    tokens, gained, prefill_s, decode_s = run(engine, ids, max_new_tokens, sampling, take)
    rest = stream.flush()
    if show:
        print(rest, flush=True)
    if stream.stopped and len(tokens) > stream.tokens:  # the rest of a cycle
        gained[-1] -= len(tokens) - stream.tokens
        tokens = tokens[:stream.tokens]
    cuda = engine.device.type == "cuda"
    if stream.stopped:
        stop = "string"
    elif tokens[-1] in tokenizer.stop_ids:
        stop = "eos"
    else:
        stop = "length" if len(tokens) == max_new_tokens else "context"
    depths = range(1, engine.drafter.max_depth + 1)
    return {
        "method": method, "text": tokenizer.decode(tokens, stops), "tokens": tokens,
        "prompt_tokens": len(ids), "new_tokens": len(tokens), "cycles": len(gained), "gained": gained,
        "mean_gained": sum(gained) / len(gained) if gained else 0.0,
        "accept_by_depth": [sum(g > d for g in gained) / max(len(gained), 1) for d in depths],
        "prefill_s": prefill_s, "decode_s": decode_s,
        "tokens_per_sec": (len(tokens) - 1) / decode_s if gained else 0.0, "compile_s": engine.compile_s,
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Generate text, with or without EAGLE-2.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    method = p.add_mutually_exclusive_group()
    method.add_argument("--eagle2", action="store_true", help="draft with EAGLE-2's dynamic tree")
    method.add_argument("--eagle", action="store_true", help="draft with EAGLE's fixed tree")
    method.add_argument("--medusa", type=Path, metavar="DIR", help="draft with these Medusa heads")
    method.add_argument("--speculate", type=Path, metavar="DIR", help="draft with a smaller model of the same tokens")
    method.add_argument("--lookahead", action="store_true", help="draft with n-grams from Jacobi iterations")
    p.add_argument("--lookup", action="store_true", help="draft what the text itself suggests; with --eagle2 beside "
                   "its tree, with --speculate to speed up the draft model")
    p.add_argument("--rejection", action="store_true", help="--speculate: the papers' rule when sampling; more is "
                   "accepted, but the same seed no longer gives the text of plain decoding")
    add_options(p)
    p.add_argument("--prompt", required=True, help="the text, - for stdin, or @FILE")
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top_k", type=int, default=0, help="0: off")
    p.add_argument("--top_p", type=float, default=1.0, help="1: off")
    p.add_argument("--min_p", type=float, default=0.0, help="0: off")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same text with any drafter")
    p.add_argument("--compare", action="store_true", help="run vanilla too and compare speed and tokens")
    p.add_argument("--tree_table", action="store_true", help="--draft_tokens auto, and show what it compared")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the device is fast at it")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    p.add_argument("--max_seq_len", type=int, help="cache slots (default: the model's context, at most 4096)")
    p.add_argument("--no_compile", action="store_true", help="no CUDA graphs: launch every kernel from Python")
    p.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    args = p.parse_args(argv)
    drafts = [name for name in ("eagle2", "eagle", "medusa", "speculate", "lookahead") if getattr(args, name)]
    args.method = "+".join(drafts + [name for name in ("lookup", "rejection") if getattr(args, name)]) or "vanilla"
    wrong = check_options(args, [args.method])
    if wrong:
        p.error(wrong)
    for wrong, message in (
            (args.method not in METHODS, f"{args.method} is no method: there are {', '.join(METHODS)}"),
            (args.tree_table and not args.eagle2, "--tree_table is for --eagle2"),
            (args.tree_table and args.draft_tokens not in (None, "auto"), "--tree_table is for --draft_tokens auto"),
            (args.tree_table and (args.draft_depth or args.draft_topk), "--tree_table chooses depth and top-k too"),
            (args.compare and args.method == "vanilla", "--compare needs a method that drafts, such as --eagle2"),
            ("" in args.stop, "--stop must not be empty"),
            (args.max_new_tokens < 1, "--max_new_tokens must be at least 1"),
            (args.max_seq_len is not None and not 2 <= args.max_seq_len <= 2**24,  # fp32 counts places no further
             "--max_seq_len must be 2 to 16777216"),
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


def placement(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """Device and dtype."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 halves the bytes; a CPU without instructions for it (x86: AVX512-BF16 or AMX) emulates it slowly
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    default = "bfloat16" if fast_bf16 else "float16" if device == "cuda" else "float32"
    return device, DTYPES[args.dtype or default]


def context(args: argparse.Namespace, cfg: Config) -> int:
    """How many slots the cache has."""
    return args.max_seq_len or min(cfg.max_position_embeddings, cfg.sliding_window or 4096, 4096)


def load(args: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    """The engine that the command line describes. Raises ValueError or OSError with one line to show."""
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    model = load_model(args.checkpoint, *placement(args), args.quantize, args.group or 128)
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}")
    max_seq_len = context(args, model.cfg)
    drafter = make_drafter(args.method, args, model, max_seq_len)
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
    try:
        work(args)
    except RuntimeError as e:
        if not memory.exhausted(e):
            raise
        folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
        sys.exit(fail(MemoryError(memory.advice(args, *placement(args), context(args, Config.load(folder))))))


def work(args: argparse.Namespace) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    try:
        engine, tokenizer = load(args)
        ids = read_prompt(args, tokenizer)
        engine.check(ids)
    except (ValueError, OSError) as e:
        sys.exit(fail(e))
    engine.warm_up(sampling)
    result = generate(engine, ids, args.max_new_tokens, sampling, tokenizer, args.method, True, args.stop)
    print(report(result), file=sys.stderr)
    if args.compare:
        plain = Engine(engine.model, Vanilla(engine.device), engine.max_seq_len, tokenizer.stop_ids,
                       not args.no_compile)
        plain.warm_up(sampling)
        result["vanilla"] = generate(plain, ids, args.max_new_tokens, sampling, tokenizer, stops=args.stop)
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
