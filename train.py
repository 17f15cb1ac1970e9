"""Train a draft head for any converted chat model, on one GPU, from nothing but the model itself.

    python train.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py --checkpoint checkpoints/Qwen/Qwen2.5-Coder-1.5B-Instruct --kind eagle3 --minutes 30

1. Data: the model writes its own dialogues, thousands at a time, user turns included. So the head learns what it will
   be asked to guess, without a data set or a network. The dialogues are kept in <work>/dialogues.bin.
2. Training: the frozen target computes its hidden states on the fly. The head is unrolled as in drafting: step 1 reads
   the target's, step j its own predictions of step j - 1. The loss is the cross-entropy with the target's own
   distribution (regression on the features did not help: docs/experiments.md). How much memory that takes is printed
   first, and batches that would not fit are made smaller.
3. Evaluation on held-out dialogues with the real tree and the real engine: tokens per step, what trees of other sizes
   would have reached (acceptance.json, from which drafters/tree_size.py chooses the best size), and the speed.

Stop it at any time: the same command goes on where it stopped. Heads of all kinds are trained from the same dialogues.
They are saved as such heads are published, so other engines load them too.

A trap: starting an EAGLE-1/2 head from the target's last layer instead of small random weights diverges. That layer
expects a normed input, and the head's layer has none.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from formats.config import Config
from formats.eagle import save_vocab
from formats.questions import read_questions
from formats.writing import locked
from model import load_model
from tokenizer import Tokenizer
from training.block import BlockTrainer
from training.commands import at_least, options, prepare, read_options
from training.dialogues import check_answers
from training.eagle3 import Eagle3Trainer
from training.evaluation import compare_speeds, evaluate, held_out_prompts, save_curve
from training.exported import foreign
from training.memory import fit_batch, smaller_batches
from training.trainer import Trainer

KINDS: dict[str, type[Trainer]] = {"eagle": Trainer, "eagle3": Eagle3Trainer, "block": BlockTrainer}
LONGEST_QUESTION = 700  # tokens; longer ones of --questions are left out
TIMED_PROMPTS = 20  # held-out prompts that decoding is timed on


def parse_args() -> argparse.Namespace:
    p = options("Train a draft head by self-distillation.")
    p.add_argument("--kind", choices=KINDS, default="eagle", help="eagle: EAGLE-1/2; eagle3: EAGLE-3; "
                   "block: a head that drafts all levels in one forward")
    p.add_argument("--out", type=Path, help="folder for the head (default: <checkpoint>/<kind>)")
    p.add_argument("--unroll", type=int, default=4, help="eagle, eagle3: draft steps that training unrolls")
    p.add_argument("--held_out", type=at_least(0), default=500, metavar="N", help="measure the agreement on held-out "
                   "dialogues every N steps, in whole hundreds, and write it to <work>/<kind>/curve.json; 0: never")
    p.add_argument("--target_quantize", choices=["int8"], help="keep the model in int8 meanwhile: half its memory")
    p.add_argument("--draft_vocab", type=int, metavar="N", help="draft only these many tokens, which the model writes "
                   "most often (default: 16384; 0: all). eagle, and with --steps 0 for any trained head: by a list "
                   "beside it, draft_vocab.json; the prompt's own tokens are drafted too. eagle3, block: as a part of "
                   "the head")
    p.add_argument("--regression", type=float, help="eagle: weight of the regression on features in the loss")
    p.add_argument("--head_layers", type=int, choices=range(1, 6), metavar="N", help="eagle3, block: layers of the "
                   "head (default: 1 and 2)")
    p.add_argument("--mlp", type=at_least(1), metavar="N", help="eagle3, block: width of its MLP (default: the "
                   "model's)")
    p.add_argument("--kv_heads", type=int, metavar="N", help="eagle3, block: key/value heads of its layers "
                   "(default: the model's)")
    p.add_argument("--block_size", type=int, choices=range(2, 17), metavar="N", help="block: levels that are drafted "
                   "(default: 8)")
    p.add_argument("--markov_rank", type=at_least(0), metavar="N", help="block: rank of its Markov head (default: 128; "
                   "0: none)")
    p.add_argument("--anchors", type=at_least(1), metavar="N", help="block: random positions of each dialogue after "
                   "which a training step predicts a block; used instead of --places (default: 128)")
    p.add_argument("--norms", action="store_true", default=None, help="eagle3: EAGLE-3.1's norms, of each tap "
                   "before fc, and of what is fed back")
    p.add_argument("--share_lm_head", action="store_true", default=None, help="eagle3: draft with the model's own "
                   "lm_head, which is neither trained nor stored in the head: a smaller file")
    p.add_argument("--init", type=Path, metavar="DIR", help="eagle3: start from this EAGLE-3 head")
    p.add_argument("--questions", type=Path, nargs="*", default=[], metavar="FILE",
                   help="also evaluate on every second question of these files: JSON lines with \"turns\"")
    args = read_options(p)
    kind = KINDS[args.kind]
    for name in sorted({name for other in KINDS.values() for name in other.own_options} - {*kind.own_options}):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} is no option of --kind {args.kind}")
    args.regression = args.regression or 0.0
    args.out = args.out or args.checkpoint / args.kind
    args.work = args.work or args.checkpoint / "training"
    return args


def main() -> None:
    args = parse_args()
    if args.checkpoint.is_file():
        raise ValueError(f"--checkpoint {args.checkpoint}: give its folder (for int8 weights --target_quantize "
                         "int8 too)")
    KINDS[args.kind].check(args, Config.load(args.checkpoint))  # says what is wrong before folders are made
    with locked(args.work), locked(args.out), smaller_batches(args):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Write the dialogues, train, and evaluate, each as far as the options ask for it and it is not done yet."""
    questions = {str(path): read_questions(path)[::2] for path in args.questions}
    listed = KINDS[args.kind].listed(args, Config.load(args.checkpoint))
    has_head = (args.out / "config.json").exists()
    if args.eval_prompts and not (args.steps or listed or has_head):
        raise ValueError(f"{args.out}: no head to evaluate: name its folder with --out, or its kind with --kind; "
                         "without one give --eval_prompts 0")
    tokenizer, data = write_and_train(args)
    # A list that no one asked for is not written from so few dialogues that it would lack frequent tokens.
    if listed and (args.draft_vocab or torch.bincount(data[data >= 0]).count_nonzero() >= listed):
        save_vocab(data, args.out, listed)
    if not args.eval_prompts or not (args.steps or has_head):
        return
    model = load_model(args.checkpoint, args.device, torch.bfloat16, args.target_quantize)
    held_out = held_out_prompts(data[:min(args.eval_prompts, args.generate_batch)])  # further ones were learned
    sets = {"held-out dialogues": held_out}
    for name, asked in questions.items():
        prompts = [tokenizer.dialogue(question.turns[:1]) for question in asked]
        sets[name] = [ids for ids in prompts if len(ids) <= LONGEST_QUESTION]
    for name, prompts in sets.items():
        if not prompts:
            print(f"{name}: no prompt to evaluate on", file=sys.stderr)
            continue
        greedy, sampled = [evaluate(model, args.out, prompts, tokenizer.stop_ids, t) for t in (0.0, 1.0)]
        print(f"tokens per step on {len(prompts)} {name}: greedy {greedy:.2f}, T=1 {sampled:.2f}", flush=True)
    save_curve(model, args.out, [ids for prompts in sets.values() for ids in prompts], tokenizer.stop_ids)
    if held_out:
        print(compare_speeds(model, args.out, held_out[:TIMED_PROMPTS], tokenizer.stop_ids), flush=True)


def write_and_train(args: argparse.Namespace) -> tuple[Tokenizer, Tensor]:
    """Write the dialogues and train. Returns the tokenizer and the dialogues [rows, length]; what training needed is
    freed."""
    state = args.work / args.kind
    old = args.work / "state.pt"  # of an EAGLE-1/2 head, from the time when there were no others
    if args.steps and old.exists() and not (args.work / "eagle/state.pt").exists():
        (args.work / "eagle").mkdir(exist_ok=True)
        old.rename(args.work / "eagle/state.pt")
    if args.steps and foreign(state, args.out):
        raise ValueError(f"{args.out} holds a head already; choose another --out, or move the head away")
    model, tokenizer, data = prepare(args, args.target_quantize)
    if not args.steps:
        return tokenizer, data
    held_out, to_learn = data.tensor_split([args.generate_batch])  # the first batch, with its own seed
    check_answers(to_learn, args.work / "dialogues.bin")
    trainer = KINDS[args.kind](model, args, to_learn, held_out)
    trainer.resume(state)
    args.batch = fit_batch(trainer)
    try:
        trainer.run(to_learn, state)
    except KeyboardInterrupt:
        trainer.save(state)
        print(f"stopped at step {trainer.step}: {args.out} is written; the same command goes on with training",
              file=sys.stderr)
        sys.exit(130)
    return tokenizer, data


if __name__ == "__main__":
    run_command(main)
