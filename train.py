"""Train an EAGLE-1/2 draft head for any converted chat model, on one GPU, from nothing but the model itself.

    python train.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --tokens 16e6 --minutes 7

1. Data: the model writes its own dialogues, thousands at a time, user turns included. So the head learns what it will
   be asked to guess, without a data set or a network. The dialogues are kept in <work>/dialogues.bin.
2. Training: the frozen target computes the features on the fly. The head is unrolled as in drafting: step 1 reads the
   target's features, step j its own predictions of step j - 1. The loss is the cross-entropy with the target's own
   distribution (regression on the features did not help: docs/experiments.md).
3. Evaluation on held-out dialogues with the real tree and the real engine: tokens per step, and what trees of other
   sizes would have reached (acceptance.json, from which drafters/tree_size.py chooses the best size).

Stop it at any time: the same command goes on where it stopped. The head is saved as EAGLE heads are published, so vLLM,
SGLang and the EAGLE reference load it too.

A trap: starting from the target's last layer instead of small random weights diverges. That layer expects a normed
input, and the head's layer has none.
"""
from app.command import run_command, watch_for_ctrl_c

if __name__ == "__main__":
    watch_for_ctrl_c()

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from draft import Eagle2, load_head
from drafters.tree_size import LEVELS, NODES, TOPK, tokens_by_size
from engine import Engine
from formats.config import Config
from formats.eagle import CURVE, save_vocab
from formats.writing import locked, replace_files
from model import Llama, load_model
from sampling import Sampling
from training.trainer import Trainer, options, prepare
from tree import MAX_NODES, Candidates

LONGEST_QUESTION = 700  # tokens; longer ones of --questions are left out


def evaluate(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int], temperature: float,
             new_tokens: int = 128) -> float:
    """Tokens per step with the head in `out` and EAGLE-2's default tree: all tokens committed after prefill, divided by
    all cycles."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, Eagle2(load_head(out, model), model), longest, stop_ids)
    committed = []  # tokens of each cycle
    for ids in prompts:
        prefill, *cycles = engine.generate(ids, new_tokens, Sampling(temperature=temperature))
        committed += map(len, cycles)
    return sum(committed) / max(len(committed), 1)


def save_curve(model: Llama, out: Path, prompts: list[list[int]], stop_ids: frozenset[int],
               new_tokens: int = 128) -> None:
    """Write acceptance.json beside the head in `out`: the tokens per step of trees of all sizes, greedily. All are read
    from the candidates of the largest tree, which is drafted here (drafters/tree_size.py)."""
    longest = max(map(len, prompts), default=0) + new_tokens
    model.free_cache()
    engine = Engine(model, Eagle2(load_head(out, model), model, MAX_NODES, LEVELS, TOPK), longest, stop_ids)
    cycle = engine.captured(engine.cycle, "cycle")
    counts = []  # of each cycle, [sizes, levels]
    for ids in prompts:
        state = engine.prefill(ids, new_tokens, Sampling())
        drafted = []  # of each cycle: the length of the text before it, and its candidates
        while not state.done:
            length = int(state.length)
            cycle()
            drafted.append((length, Candidates(*(t.to("cpu", copy=True) for t in engine.drafter.scores()[:3]))))
        # The whole text, not what each cycle committed: another tree might have had more of it accepted.
        text = state.tokens[:int(state.length)].tolist()
        counts += [tokens_by_size(candidates, text[length:]) for length, candidates in drafted]
    mean = torch.stack(counts).double().mean(0) if counts else torch.ones(len(NODES), LEVELS)
    curve = {"nodes": NODES, "topk": TOPK, "gained": [[round(x, 3) for x in row] for row in mean.tolist()]}
    with replace_files(out) as part:
        (part / CURVE).write_text(json.dumps(curve) + "\n", encoding="utf-8")


def held_out_prompts(data: Tensor) -> list[list[int]]:
    """The ids of each dialogue in data [dialogues, S], marked, up to its first answer. Dialogues without an answer are
    left out."""
    prompts = []
    for marked in data.tolist():
        first_answer = next((i for i, t in enumerate(marked) if t >= 0), 0)
        if first_answer:
            prompts.append([~t for t in marked[:first_answer]])
    return prompts


def parse_args() -> argparse.Namespace:
    p = options("Train an EAGLE-1/2 head by self-distillation.")
    p.add_argument("--out", type=Path, help="folder for the head (default: <checkpoint>/eagle)")
    p.add_argument("--unroll", type=int, default=4, help="draft steps that training unrolls")
    p.add_argument("--regression", type=float, default=0.0, help="weight of the regression on features in the loss")
    p.add_argument("--draft_vocab", type=int, default=0, metavar="N", help="write draft_vocab.json beside the head: "
                   "the N most frequent tokens, the only ones that are drafted then; with --steps 0 for a trained head")
    p.add_argument("--questions", type=Path, nargs="*", default=[], metavar="FILE",
                   help="also evaluate on every second line of these .jsonl files (turns[0])")
    args = p.parse_args()
    args.out = args.out or args.checkpoint / "eagle"
    args.work = args.work or args.checkpoint / "training"
    return args


def main() -> None:
    args = parse_args()
    Config.load(args.checkpoint)  # says so if it is not there, before folders are made
    with locked(args.work), locked(args.out):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Write the dialogues, train, and evaluate, each as far as the options ask for it and it is not done yet."""
    if args.steps and (args.out / "config.json").exists() and not (args.work / "state.pt").exists():
        raise ValueError(f"{args.out} holds a head already; choose another --out, or move the head away")
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
        prompts = [tokenizer.chat([{"role": "user", "content": turn}]) for turn in turns]
        sets[path.name] = [ids for ids in prompts if len(ids) <= LONGEST_QUESTION]
    for name, prompts in sets.items():
        greedy, sampled = [evaluate(model, args.out, prompts, tokenizer.stop_ids, t) for t in (0.0, 1.0)]
        print(f"tokens per step on {len(prompts)} {name}: greedy {greedy:.2f}, T=1 {sampled:.2f}", flush=True)
    save_curve(model, args.out, [ids for prompts in sets.values() for ids in prompts], tokenizer.stop_ids)


if __name__ == "__main__":
    run_command(main)
