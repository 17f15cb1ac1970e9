"""Train an EAGLE-1/2 draft head for any converted chat model, on one GPU, from nothing but the model itself.

    python train.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --tokens 16e6 --minutes 7

1. Data: the model writes its own dialogues, thousands at a time, user turns included; so what the head learns
   is what it will be asked to guess. No data set, no network. They land in <work>/dialogues.bin.
2. Training: features come from the frozen target on the fly. The head is unrolled as when drafting: step 1
   sees true features, step j its own guesses from step j - 1. The loss is the cross-entropy with the target's
   own distribution (feature regression did not help: BENCHMARKS.md).
3. Evaluation on held-out dialogues with the real tree and the real engine: mean tokens gained a cycle, and what
   other trees would have gained (acceptance.json, by which autotree.py chooses one).

Stop it at any time: the same command goes on where it stopped. The head is saved as EAGLE heads are published,
so vLLM, SGLang and the EAGLE reference load it too. Starting from the target's last layer instead of small
random weights diverges: that layer expects a normed input and this one has none.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from draft import Eagle2, load_head
from drafters.tree_size import LEVELS, NODES, TOPK, gained
from engine import Engine
from formats.eagle import CURVE, save_vocab
from model import Llama, load_model
from sampling import Sampling
from training.trainer import Trainer, options, prepare
from tree import MAX_NODES, Candidates


def evaluate(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int], temperature: float,
             new_tokens: int = 128) -> float:
    """Mean tokens gained a cycle, EAGLE-2's default tree: all tokens committed after prefill / all cycles."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, Eagle2(load_head(out, model), model), longest, stop_ids)
    gained = [len(new) for ids in prompts for new in
              list(engine.generate(ids, new_tokens, Sampling(temperature=temperature)))[1:]]
    return sum(gained) / max(len(gained), 1)


def save_curve(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int],
               new_tokens: int = 128) -> None:
    """What every tree would have gained a cycle where the largest one was drafted, greedily, beside the head."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, Eagle2(load_head(out, model), model, MAX_NODES, LEVELS, TOPK), longest, stop_ids)
    cycle, gains = engine.captured(engine.cycle, "cycle"), []
    for ids in prompts:
        state, drafted = engine.prefill(ids, new_tokens, Sampling()), []
        while not state.done:
            length = int(state.length)
            cycle()
            drafted.append((length, Candidates(*(t.to("cpu", copy=True) for t in engine.drafter.scores()[:3]))))
        text = state.tokens[:int(state.length)].tolist()  # more of it than was accepted: others might have kept that
        gains += [gained(candidates, text[length:]) for length, candidates in drafted]
    mean = torch.stack(gains).double().mean(0) if gains else torch.ones(len(NODES), LEVELS)
    curve = {"nodes": NODES, "topk": TOPK, "gained": [[round(x, 3) for x in row] for row in mean.tolist()]}
    (out / CURVE).write_text(json.dumps(curve) + "\n", encoding="utf-8")


def held_out_prompts(data: Tensor) -> list[list[int]]:
    """Each dialogue up to its first answer; those without one are left out."""
    prompts = []
    for said in data.tolist():
        first = next((i for i, s in enumerate(said) if s >= 0), 0)
        if first:
            prompts.append([~s for s in said[:first]])
    return prompts


def parse_args() -> argparse.Namespace:
    p = options("Train an EAGLE-1/2 head by self-distillation.")
    p.add_argument("--out", type=Path, help="where the head goes (default: <checkpoint>/eagle)")
    p.add_argument("--unroll", type=int, default=4, help="draft steps that training unrolls")
    p.add_argument("--regression", type=float, default=0.0, help="weight of the feature regression")
    p.add_argument("--draft_vocab", type=int, default=0, help="list so many most frequent tokens, the only ones that "
                   "are drafted then; with --steps 0 for a head that is there already")
    p.add_argument("--questions", type=Path, nargs="*", default=[], help="also evaluate on these .jsonl (turns[0])")
    args = p.parse_args()
    args.out = args.out or args.checkpoint / "eagle"
    args.work = args.work or args.checkpoint / "training"
    return args


def main() -> None:
    args = parse_args()
    if args.steps and args.out.exists() and not (args.work / "state.pt").exists():
        sys.exit(f"error: {args.out} holds a head already; choose another --out or move it away")
    model, tokenizer, data = prepare(args)
    if args.steps:
        trainer = Trainer(model, args)
        trainer.resume(args.work)
        trainer.run(data[args.generate_batch:], args.work)  # the first batch, with its own seed, is held out
    if args.draft_vocab:
        save_vocab(data, args.out, args.draft_vocab)
    if not args.eval_prompts or not (args.out / "config.json").exists():
        return
    model = load_model(args.checkpoint, args.device, torch.bfloat16)
    sets = {"held-out dialogues": held_out_prompts(data[:args.eval_prompts])}
    for path in args.questions:
        turns = [json.loads(line)["turns"][0] for line in path.read_text(encoding="utf-8").splitlines()[::2]]
        sets[path.name] = [ids for t in turns if len(ids := tokenizer.chat([{"role": "user", "content": t}])) <= 700]
    for name, prompts in sets.items():
        scores = [evaluate(model, args.out, prompts, tokenizer.stop_ids, t) for t in (0.0, 1.0)]
        print(f"mean gained on {len(prompts)} {name}: greedy {scores[0]:.2f}, T=1 {scores[1]:.2f}", flush=True)
    save_curve(model, args.out, [ids for prompts in sets.values() for ids in prompts], tokenizer.stop_ids)


if __name__ == "__main__":
    main()
