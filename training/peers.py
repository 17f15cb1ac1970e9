"""Train EAGLE's peers, the drafters that it is compared with: Medusa heads and a draft model.

    python -m training.peers --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --int8

They are trained on the dialogues that train.py trains EAGLE's head on, with the same loss, the cross-entropy with the
target's own distribution in the answers. Both see every batch, and share the target's forward.

  Medusa heads  K heads of one block each that share the target's lm_head ("V2", arXiv 2401.10774). Head k (from 0)
                reads the feature of position p, which knows token p, and predicts feature p + k + 1, from which token
                p + k + 2 is chosen. Its loss has weight 0.8^k.
  draft model   for standard speculative sampling (arXiv 2211.17192): a Llama of two layers between the target's
                embedding and the target's lm_head. Its layers and its norm start as the target's first two layers and
                final norm. Embedding and lm_head are not trained and not in the file, whose metadata say "embedding":
                "target" (drafters/speculate.py, load_draft_model).

Stop it at any time: what was learned is written, and the same command goes on.
"""
from app.command import before_imports, run_command

if __name__ == "__main__":
    before_imports()

import argparse
import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from drafters.medusa import MedusaHeads, load_medusa, save_medusa
from drafters.speculate import load_draft_model
from formats.config import Config
from formats.weights import FORMAT, save_tensors
from formats.writing import locked, replace_files
from model import Llama, layer_ropes, load_model
from quant.linear import quantize_linears
from training.commands import at_least, options, prepare, read_options
from training.dialogues import check_answers, unmark
from training.exported import foreign
from training.memory import smaller_batches
from training.steps import in_parts, shares
from training.trainer import Trainer, check_ahead

# ----- Training ----------------------------------------------------------------------------------------------------


class Peers(nn.Module):
    """What is trained: the matrices and biases of Medusa's blocks, and the draft model's layers and norm.

    Each of Medusa's matrices is a parameter of its own, because Muon takes only matrices. MedusaHeads has them all in
    one tensor."""

    def __init__(self, target: Llama, num_heads: int, num_layers: int) -> None:
        super().__init__()
        size = target.cfg.hidden_size
        self.blocks = nn.ParameterList(torch.zeros(size, size) for _ in range(num_heads))
        self.bias = nn.Parameter(torch.zeros(1, num_heads, size))
        self.layers = copy.deepcopy(target.layers[:num_layers])
        self.norm = copy.deepcopy(target.norm)
        self.cfg = replace(target.cfg, num_layers=len(self.layers))  # of the draft model
        self.to(target.embed.weight.device, torch.float32).requires_grad_(True)

    def medusa_weights(self) -> dict[str, Tensor]:
        """The weights of MedusaHeads."""
        return {"weight": torch.stack(tuple(self.blocks))[None], "bias": self.bias}

    def medusa(self, features: Tensor) -> Tensor:
        """The features that each head predicts, [K, N, C] of features [N, C]: the forward of MedusaHeads."""
        with torch.device("meta"):
            heads = MedusaHeads(self.cfg.hidden_size, len(self.blocks))
        return functional_call(heads, self.medusa_weights(), features)

    def draft(self, embedded: Tensor, rope: Tensor) -> Tensor:
        """The features of the draft model, [B, T, C], of the embedded tokens: Llama.forward after the embedding."""
        x = embedded
        for layer, angles in zip(self.layers, layer_ropes(self.cfg, rope)):
            x = layer(x, angles, None, None, None)
        return self.norm(x)


class PeerTrainer(Trainer):
    """Trains both. The predictions, and so the agreements, are the draft model's and then each head's."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        if self.device.type == "cuda":
            for layer in self.module.layers:
                layer.compile(dynamic=False)

    @property
    def ahead(self) -> int:
        """Head k predicts feature p + k + 1, so the last of K heads looks K features ahead."""
        return self.args.heads

    @property
    def folders(self) -> tuple[Path, ...]:
        return self.args.medusa, self.args.draft_model

    def make_module(self) -> Peers:
        return Peers(self.model, self.args.heads, self.args.draft_layers)

    def losses(self, tokens: Tensor, of_answer: Tensor, features: Tensor, taps: None, places: Tensor
               ) -> tuple[Tensor, list[Tensor]]:
        """At position p the draft model predicts feature p, and head k predicts feature p + k + 1. In this order each
        prediction is one feature further ahead."""
        rows = self.rows(tokens)
        total = 0.0
        agreements = []
        with self.amp:
            drafted = self.module.draft(self.model.embed(tokens[:, :rows]), self.rope[:, :rows])
            drafted = drafted.flatten(0, 1)[places]
            heads = self.module.medusa(features[:, :rows].flatten(0, 1)[places])
            for ahead, predicted in enumerate((drafted, *heads)):
                share = shares(of_answer[:, ahead + 1:ahead + 1 + rows].flatten()[places])
                loss, agree = in_parts(partial(self.distill, self.model.lm_head.weight, 0.0), self.model.cfg.vocab_size,
                                       self.args.decay ** max(ahead - 1, 0) * share, predicted,
                                       features[:, ahead:ahead + rows].flatten(0, 1)[places])
                total = total + loss
                agreements.append((agree * share).sum())
        return total, agreements

    def export(self) -> None:
        args = self.args
        heads = MedusaHeads(self.module.cfg.hidden_size, len(self.module.blocks))
        heads.load_state_dict(self.module.medusa_weights())
        save_medusa(heads.bfloat16(), args.medusa)
        save_draft_model(self.module, args.checkpoint, args.draft_model, args.int8)


def save_draft_model(peers: Peers, checkpoint: Path, out: Path, int8: bool) -> None:
    """Write the draft model's folder: the layers and the final norm, in bf16 or in int8 as quantize.py writes it, and
    the target's config.json with another number of layers. Embedding and lm_head are left out: with a small target they
    would be most of the file."""
    draft = nn.ModuleDict({"layers": copy.deepcopy(peers.layers), "norm": peers.norm})
    metadata = {"format": FORMAT}
    if int8:
        quantize_linears(draft, "int8")
        metadata |= {"mode": "int8", "group": "0"}
    tensors = {name: t.detach().to("cpu", None if name.endswith((".data", ".scale")) else torch.bfloat16)
               for name, t in draft.state_dict().items()}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config.get("text_config", config)["num_hidden_layers"] = len(peers.layers)
    with replace_files(out) as part:
        save_tensors(part / "model.safetensors", tensors, metadata | {"embedding": "target"})
        (part / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ----- Evaluation --------------------------------------------------------------------------------------------------


@torch.no_grad()
def agreement(model: Llama, draft: Llama, heads: MedusaHeads, data: Tensor) -> tuple[list[float], float]:
    """How good the drafters are over all answers in data [dialogues, S], marked.

    Returns how often the best token of the draft model, then that of each head, is the target's; and the draft model's
    overlap, the mean of sum(min(p, q)) over the vocabulary, which is how often speculative sampling at temperature 1
    accepts its token.
    """
    device = model.embed.weight.device
    length = data.shape[1]
    model.allocate_rope(length)
    draft.allocate_rope(length)
    positions = torch.arange(length, device=device)
    agreed = 0  # [1 + heads] in the end, as is total
    total = 0
    overlap = 0.0
    for marked in data.to(device, torch.int64):
        tokens = unmark(marked)[None]
        features = model(tokens, positions)[0]
        p = model.lm_head(features).float()
        best = p.argmax(-1)
        hits = []
        counts = []
        for ahead, predicted in enumerate((draft(tokens, positions)[0], *heads(features))):
            q = draft.lm_head(predicted).float()
            of_answer = marked[ahead + 1:] >= 0  # of the tokens that are predicted
            hits.append(((q.argmax(-1)[:length - ahead - 1] == best[ahead:length - 1]) & of_answer).sum())
            counts.append(of_answer.sum())
            if ahead == 0:
                shared = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
                overlap += (shared[:-1] * of_answer).sum().item()
        agreed = agreed + torch.stack(hits)
        total = total + torch.stack(counts)
    return (agreed / total).tolist(), overlap / total[0].item()


# ----- The command -------------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    p = options("Train the drafters that EAGLE is compared with, Medusa heads and a draft model, by self-distillation.")
    p.prog = "python -m training.peers"
    p.add_argument("--medusa", type=Path, help="folder for the Medusa heads (default: <checkpoint>/medusa)")
    p.add_argument("--draft_model", type=Path, help="folder for the draft model (default: <checkpoint>/draft_model)")
    p.add_argument("--heads", type=at_least(1), default=4, help="how many Medusa heads")
    p.add_argument("--draft_layers", type=at_least(1), default=2, help="the draft model's layers: it starts from "
                   "as many of the model's first ones")
    p.add_argument("--int8", action="store_true", help="write the draft model's matrices in int8: half the size")
    args = read_options(p)
    args.medusa = args.medusa or args.checkpoint / "medusa"
    args.draft_model = args.draft_model or args.checkpoint / "draft_model"
    args.work = args.work or args.checkpoint / "training"
    return args


def main() -> None:
    args = parse_args()
    layers = Config.load(args.checkpoint).num_layers  # says so if it is not there, before folders are made
    if args.draft_layers > layers:
        raise ValueError(f"--draft_layers {args.draft_layers}: the model has {layers}")
    check_ahead("heads", args.heads, args.length)
    with locked(args.work), locked(args.medusa), locked(args.draft_model), smaller_batches(args):
        train(args)


def train(args: argparse.Namespace) -> None:
    """Write the dialogues, train, and evaluate, each as far as the options ask for it and it is not done yet."""
    state = args.work / "peers"  # train.py's own state lies beside it; both use the same dialogues
    if args.steps and (taken := foreign(state, args.medusa, args.draft_model)):
        raise ValueError(f"{taken} is there already; choose another folder, or move it away")
    model, _, data = prepare(args)
    held_out, to_learn = data.tensor_split([args.generate_batch])  # the first batch, with its own seed
    held_out = held_out[:args.eval_prompts]
    for needed, part in ((args.steps, to_learn), (args.eval_prompts, held_out)):
        if needed:
            check_answers(part, args.work / "dialogues.bin")
    if args.steps:
        trainer = PeerTrainer(model, args)
        trainer.resume(state)
        print("agreement: of the draft model, then of each Medusa head", flush=True)
        try:
            trainer.run(to_learn, state)
        except KeyboardInterrupt:
            trainer.save(state)
            print(f"stopped at step {trainer.step}: {args.medusa} and {args.draft_model} are written; "
                  "the same command goes on with training", file=sys.stderr)
            sys.exit(130)
    if args.eval_prompts:
        model = trainer = None  # what training needed is freed before the model is loaded once more
        model = load_model(args.checkpoint, args.device, torch.bfloat16)
        draft = load_draft_model(args.draft_model, model)
        heads = load_medusa(args.medusa, model)
        agreed, overlap = agreement(model, draft, heads, held_out)
        print(f"agreement on held-out dialogues: draft model {agreed[0]:.3f} (overlap at temperature 1 {overlap:.3f}), "
              "Medusa heads " + " ".join(f"{a:.3f}" for a in agreed[1:]), flush=True)


if __name__ == "__main__":
    run_command(main)
