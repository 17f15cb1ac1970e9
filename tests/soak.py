"""Hundreds of prompts of mixed length through one engine: its memory stays flat, and what it writes is what an engine
writes that has seen nothing before. Every option of generate.py is one here too; minutes with the demo model.

    python tests/soak.py --prompts 500 --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --eagle2
"""
import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from resource import getpagesize

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this file is run as a script

import generate
from app import options
from drafters.methods import make_drafter
from engine import Engine
from sampling import Sampling


def taken(device: torch.device) -> int:
    """Bytes: on a GPU those of live tensors, else all that this process has in memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def soak(make: Callable[[], Engine], prompts: int, vocab_size: int, sample: int, seed: int = 0) -> tuple[int, int, int]:
    """Prompts of 1 to all tokens but one, most of them short, each continued by 1 to 40, every third one sampled, some
    abandoned halfway. Returns how many bytes were taken after a fifth of them and at the end, and how many of `sample`
    texts differ from a fresh engine's."""
    draw, engine, texts, early = random.Random(seed), make(), [], 0
    for number in range(prompts):
        length = int((engine.max_seq_len - 1) ** draw.random())
        ids, count = [draw.randrange(vocab_size) for _ in range(length)], draw.randrange(1, 41)
        how = Sampling(temperature=0.8, top_p=0.9, seed=number) if number % 3 == 0 else Sampling()
        cycles = engine.generate(ids, count, how)
        if number % 7 == 0:
            next(cycles)
            cycles.close()
        else:
            texts.append((ids, count, how, sum(cycles, [])))
        if number == prompts // 5:
            early = taken(engine.device)
    late, wrong = taken(engine.device), 0
    for ids, count, how, text in draw.sample(texts, sample):
        engine.model.free_cache()  # a fresh one has a cache of its own
        wrong += sum(make().generate(ids, count, how), []) != text
    return early, late, wrong


def main() -> None:
    at = sys.argv.index("--prompts") if "--prompts" in sys.argv else 0
    prompts = int(sys.argv[at + 1]) if at else 500
    words = sys.argv[1:at] + sys.argv[at + 2:] if at else sys.argv[1:]
    args = generate.parse_args([*words, "--prompt", "-"])
    engine = options.load_engine(args)
    tokenizer = engine.tokenizer
    model, slots, stops, start = engine.model, engine.max_seq_len, tokenizer.stop_ids, time.perf_counter()

    def make() -> Engine:
        return Engine(model, make_drafter(args.method, args, model, slots), slots, stops, not args.no_compile)

    early, late, wrong = soak(make, prompts, min(tokenizer.vocab_size, model.cfg.vocab_size), 20)
    print(f"{prompts} prompts in {time.perf_counter() - start:.0f} s: {early / 1e6:.1f} MB after a fifth of them, "
          f"{late / 1e6:.1f} MB at the end; {wrong} of 20 texts differ from a fresh engine's")
    sys.exit(wrong > 0 or late > 1.02 * early)


if __name__ == "__main__":
    main()
