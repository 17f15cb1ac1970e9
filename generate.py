"""Generate text with a Llama, one sequence on one device, as fast as it goes; with EAGLE-2 the same text faster.

    python generate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2 --compare \\
        --prompt "Give me three tips for sleeping better."

Each cycle a drafter proposes a tree of continuations (draft.py), one forward of the target over all its nodes
says what the target would have written after each, and the longest path that agrees is committed, with one
bonus token (tree.py). Vanilla decoding is the same cycle with a tree of one node. Lengths, positions and masks
live on the device; the host reads back what was committed and nothing else.

Text goes to stdout as it is written, statistics to stderr; with --json the last line of stdout is one object.
"""
import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draft import Eagle1, Eagle2, State, load_head
from model import Llama, load_model
from tokenizer import Tokenizer
from tree import Tree, accept, causal_mask, choose, gumbel_noise, sees, tree_mask

PREFILL_CHUNK = 512  # prompt tokens a forward
SPARE = 128  # cache slots past max_seq_len, for drafts that reach beyond the last token to be committed
CPU_TREE = (8, 3, 3)  # tokens, depth, topk where width is not free; see BENCHMARKS.md
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. The same seed gives the same text,
    whatever the drafter."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class Vanilla:
    """No draft: the root alone."""
    num_nodes, max_depth, scratch = 1, 0, 0

    def prefill(self, tokens: Tensor, features: Tensor, first: int) -> None:
        pass

    def propose(self, state: State) -> Tree:
        root = state.tokens.index_select(0, (state.length - 1)[None])
        zero = torch.zeros_like(root)
        return Tree(root, zero, zero, zero + 1)


class Engine:
    """A model, a drafter and the state of one sequence. Call `generate` again and again, one at a time."""

    def __init__(self, model: Llama, drafter: Vanilla | Eagle1 | Eagle2, max_seq_len: int,
                 stop_ids: frozenset[int] = frozenset()) -> None:
        self.model, self.drafter, self.max_seq_len = model, drafter, max_seq_len
        self.device = model.embed.weight.device
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.slots, self.compile_s = max_seq_len + SPARE, 0.0
        if model.kv is None or model.kv.shape[4] < self.slots:
            model.allocate_cache(max_seq_len, SPARE)
        if not isinstance(drafter, Vanilla):
            drafter.head.allocate_cache(self.slots)

    def check(self, ids: list[int]) -> None:
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(ids)} tokens and --max_seq_len {self.max_seq_len} leaves no room "
                             f"for more (the model was made for {self.model.cfg.max_position_embeddings})")

    def warm_up(self, sampling: Sampling) -> None:
        """Run a few cycles, so that what happens once (kernel selection, allocation) is not timed as decoding."""
        start = time.perf_counter()
        for _ in self.generate([0] * min(8, self.max_seq_len - 1), 8, sampling):
            pass
        self.compile_s = time.perf_counter() - start

    @torch.inference_mode()
    def prefill(self, ids: list[int], max_new_tokens: int, sampling: Sampling) -> State:
        """Process the prompt and commit the first new token. Raises ValueError where it does not fit."""
        self.check(ids)
        n, device = len(ids), self.device
        self.sampling = sampling
        self.seed = torch.tensor(sampling.seed, device=device)
        self.limit = torch.tensor(min(n + max_new_tokens, self.max_seq_len), device=device)
        tokens = torch.zeros(self.slots, dtype=torch.int64, device=device)
        tokens[:n] = torch.tensor(ids, device=device)
        for a in range(0, n, PREFILL_CHUNK):
            b = min(a + PREFILL_CHUNK, n)
            features = self.chunk(tokens[a:b], a)
            known = min(b, n - 1)  # entry i of the head wants token i + 1; the last one is not chosen yet
            if known > a:
                self.drafter.prefill(tokens[a + 1:known + 1], features[:known - a], a)
        pending = features.new_zeros(self.drafter.max_depth + 1, features.shape[1])
        pending[0], zero = features[-1], torch.tensor(0, device=device)
        state = State(tokens, torch.tensor(n, device=device), pending, zero, zero > 0, self.slots)
        self.commit(state, zero, self.choose(features[-1:], state.length[None]))
        return state

    def chunk(self, tokens: Tensor, first: int) -> Tensor:
        """Features [T, C] of tokens [T] that stand at places first, first + 1, ...; fills their cache slots."""
        slots = torch.arange(first, first + len(tokens), device=self.device)
        mask = causal_mask(first, len(tokens), first + len(tokens), self.device)
        return self.model(tokens[None], slots, slots, mask)[0]

    def choose(self, features: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """The target's next token [T] after each of features [T, C]. `positions` [N]: the places these tokens
        will take, one entry per distinct place; rows [T] says which place belongs to which feature."""
        logits, s, noise = self.model.lm_head(features), self.sampling, None
        if s.temperature > 0:
            noise = gumbel_noise(self.seed, positions, logits.shape[-1])
            noise = noise if rows is None else noise[rows]
        return choose(logits, noise, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p)

    @torch.inference_mode()
    def cycle(self, state: State) -> None:
        """Draft, verify, accept, commit. Once `state.done`, a cycle changes nothing."""
        base, device = state.length - 1, self.device
        tree = self.drafter.propose(state)
        slots = base + torch.arange(len(tree.tokens), device=device)
        mask = tree_mask(sees(tree), base, state.width)
        features = self.model(tree.tokens[None], base + tree.depth, slots, mask)[0]
        places = state.length + torch.arange(self.drafter.max_depth + 1, device=device)
        path, accepted, out = accept(tree, self.choose(features, places, tree.depth), self.drafter.max_depth)
        if len(tree.tokens) > 1:  # the accepted rows move to the front; gathered first, for the slots overlap
            kept = base + torch.arange(len(path), device=device)
            self.model.kv.index_copy_(4, kept, self.model.kv.index_select(4, base + path))
        self.commit(state, accepted, out)
        state.features = features[path]

    def commit(self, state: State, accepted: Tensor, out: Tensor) -> None:
        """Append out[: accepted + 1], cut after the first stop id and at the length limit."""
        steps = torch.arange(len(out), device=self.device)
        state.tokens.index_copy_(0, state.length + steps, out)
        is_stop = (out[:, None] == self.stop_ids).any(1)
        first_stop = torch.where(is_stop, steps, len(out)).amin()
        count = torch.minimum(torch.minimum(accepted, first_stop) + 1, self.limit - state.length)
        count = torch.where(state.done, 0, count)
        state.length = state.length + count
        state.committed = torch.where(state.done, state.committed, count)
        state.done = state.done | (first_stop < count) | (state.length >= self.limit)

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling = Sampling()) -> Iterator[list[int]]:
        """Yield the new token ids, cycle by cycle: first the one that prefill chose, then what each cycle
        committed. Ends after a stop id (yielded too), max_new_tokens, or a full context."""
        state, length, done = self.prefill(ids, max_new_tokens, sampling), len(ids), False
        while True:
            now, done = int(state.length), bool(state.done)
            yield state.tokens[length:now].tolist()
            if done:
                return
            length = now
            if self.device.type == "cpu":  # on a CPU attention over unused slots costs time; on CUDA, new shapes do
                state.width = min(-(-(length + SPARE) // 128) * 128, self.slots)
            self.cycle(state)

    @torch.inference_mode()
    def top2_gap(self, ids: list[int]) -> float:
        """How far apart the target's two best logits after `ids` are: near 0, rounding decides between them."""
        for a in range(0, len(ids), PREFILL_CHUNK):
            features = self.chunk(torch.tensor(ids[a:a + PREFILL_CHUNK], device=self.device), a)
        best = self.model.lm_head(features[-1]).float().topk(2).values
        return (best[0] - best[1]).item()


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
        "device": torch.cuda.get_device_name() if cuda else
                  f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
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
    return (f"{speed_up:.2f}x vanilla; the tokens differ from number {at} on, where vanilla's two best logits are "
            f"{engine.top2_gap(ids + b[:at]):.3g} apart ({vanilla['dtype']} rounding; float32 does not differ)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Generate text, with or without EAGLE-2.")
    p.add_argument("--checkpoint", type=Path, required=True, help="converted folder, or a model file in it")
    method = p.add_mutually_exclusive_group()
    method.add_argument("--eagle2", action="store_true", help="draft with EAGLE-2's dynamic tree")
    method.add_argument("--eagle", action="store_true", help="draft with EAGLE's fixed tree")
    p.add_argument("--draft", type=Path, help="folder of the draft head (default: <checkpoint>/eagle)")
    p.add_argument("--prompt", required=True, help="the text, - for stdin, or @FILE")
    p.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    p.add_argument("--top_k", type=int, default=0, help="0: off")
    p.add_argument("--top_p", type=float, default=1.0, help="1: off")
    p.add_argument("--min_p", type=float, default=0.0, help="0: off")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same text with any drafter")
    p.add_argument("--compare", action="store_true", help="run vanilla too and compare speed and tokens")
    p.add_argument("--draft_tokens", type=int, help="nodes of EAGLE-2's tree, the root included")
    p.add_argument("--draft_depth", type=int, help="levels of drafted tokens")
    p.add_argument("--draft_topk", type=int, help="nodes fed a level, and continuations of each")
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 where the device is fast at it")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    p.add_argument("--max_seq_len", type=int, help="cache slots (default: the model's context, at most 4096)")
    p.add_argument("--json", action="store_true", help="end stdout with one line of JSON")
    args = p.parse_args(argv)
    shape = (args.draft_tokens, args.draft_depth, args.draft_topk)
    for wrong, message in (
            (any(shape) and not args.eagle2, "--draft_tokens, --draft_depth and --draft_topk shape --eagle2's tree"),
            ((args.draft or args.compare) and not (args.eagle2 or args.eagle),
             "--draft and --compare need --eagle2 or --eagle"),
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


def load(args: argparse.Namespace) -> tuple[Engine, Tokenizer]:
    """The engine that the command line describes. Raises ValueError or OSError with one line to show."""
    folder = args.checkpoint.parent if args.checkpoint.is_file() else args.checkpoint
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # bf16 halves the bytes; a CPU without instructions for it (x86: AVX512-BF16 or AMX) emulates it slowly
    fast_bf16 = torch.cuda.is_bf16_supported() if device == "cuda" else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    default = "bfloat16" if fast_bf16 else "float16" if device == "cuda" else "float32"
    model = load_model(args.checkpoint, device, DTYPES[args.dtype or default])
    tokenizer = Tokenizer(folder)
    if tokenizer.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model {model.cfg.vocab_size}")
    drafter = Vanilla()
    if args.eagle2 or args.eagle:
        head = load_head(args.draft or folder / "eagle", model)
        tokens, depth, topk = (60, 6, 10) if device == "cuda" else CPU_TREE
        drafter = Eagle1(head, model) if args.eagle else Eagle2(
            head, model, args.draft_tokens or tokens, args.draft_depth or depth, args.draft_topk or topk)
    max_seq_len = args.max_seq_len or min(model.cfg.max_position_embeddings, model.cfg.sliding_window or 4096, 4096)
    return Engine(model, drafter, max_seq_len, tokenizer.stop_ids), tokenizer


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
        plain = Engine(engine.model, Vanilla(), engine.max_seq_len, tokenizer.stop_ids)
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
