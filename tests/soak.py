"""Run hundreds of prompts of mixed length through one engine: its memory must stay flat, and its texts must be those of
a fresh engine. Takes generate.py's options and --prompts N; a few minutes with the demo model.

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from any folder

import generate
from app.options import load_engine
from drafters.methods import make_drafter
from engine import Engine
from sampling import Sampling


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a GPU of all live tensors, on a CPU the resident size of this process."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def soak(make: Callable[[], Engine], prompts: int, vocab_size: int, sample: int, seed: int = 0) -> tuple[int, int, int]:
    """Continue random prompts of 1 to max_seq_len - 1 tokens, most of them short, by 1 to 40 tokens each. Every third
    text is sampled, every seventh is abandoned after its first token.

    Returns the bytes in use after a fifth of the prompts and at the end, and how many of `sample` texts differ from a
    fresh engine's. `make` makes an engine."""
    draw = random.Random(seed)
    engine = make()
    texts = []
    early = 0
    for number in range(prompts):
        length = int((engine.max_seq_len - 1) ** draw.random())
        ids = [draw.randrange(vocab_size) for _ in range(length)]
        count = draw.randrange(1, 41)
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=number) if number % 3 == 0 else Sampling()
        cycles = engine.generate(ids, count, sampling)
        if number % 7 == 0:
            next(cycles)
            cycles.close()
        else:
            texts.append((ids, count, sampling, sum(cycles, [])))
        if number == prompts // 5:
            early = memory_in_use(engine.device)
    late = memory_in_use(engine.device)
    wrong = 0
    for ids, count, sampling, text in draw.sample(texts, sample):
        engine.model.free_cache()  # so that the fresh engine gets a new cache too
        wrong += sum(make().generate(ids, count, sampling), []) != text
    return early, late, wrong


def main() -> None:
    words = sys.argv[1:]
    prompts = 500
    if "--prompts" in words:
        at = words.index("--prompts")
        prompts = int(words[at + 1])
        del words[at:at + 2]
    args = generate.parse_args([*words, "--prompt", "-"])
    engine = load_engine(args)
    model, slots, stop_ids = engine.model, engine.max_seq_len, engine.tokenizer.stop_ids
    start = time.perf_counter()

    def make() -> Engine:
        return Engine(model, make_drafter(args.method, args, model, slots), slots, stop_ids, not args.no_compile)

    vocab_size = min(engine.tokenizer.vocab_size, model.cfg.vocab_size)
    early, late, wrong = soak(make, prompts, vocab_size, 20)
    print(f"{prompts} prompts in {time.perf_counter() - start:.0f} s: {early / 1e6:.1f} MB after a fifth of them, "
          f"{late / 1e6:.1f} MB at the end; {wrong} of 20 texts differ from a fresh engine's")
    sys.exit(wrong > 0 or late > 1.02 * early)


if __name__ == "__main__":
    main()
