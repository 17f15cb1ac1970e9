"""Train what EAGLE is to be compared with, on the same dialogues and in the same time: Medusa heads, a draft model.

    python train_peers.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct --tokens 24e6 --minutes 12 \\
        --steps 20000 --int8

Both see every batch, and share the target's forward. As for EAGLE's head (train.py) the loss is the cross-entropy with
the target's own distribution, over the answers of dialogues that the target wrote itself.

  Medusa        K heads of one block each that share the target's lm_head ("V2", arXiv 2401.10774). Head k reads the
                feature of a place, its token included, and guesses the token k + 2 places on: the target's
                distribution k + 1 places on, loss weight 0.8^k.
  draft model   for standard speculative sampling (arXiv 2211.17192): a Llama of two layers, to begin with the target's
                first two and its final norm, between the target's embedding and its lm_head. These are not trained
                and not in the file, whose metadata say "embedding": "target" (speculate.load_draft_model).

Stop it at any time: what was learned is written, and the same command goes on.
"""
import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from drafters.medusa import MedusaHeads, load_medusa, save_medusa
from drafters.speculate import load_draft_model
from formats.config import Config
from formats.weights import FORMAT
from model import Llama, load_model, rope_table
from quant.linear import quantize_linears
from training.trainer import Trainer, options, prepare


class Peers(nn.Module):
    """What is trained. Medusa's blocks are matrices of their own here, because Muon takes nothing else."""

    def __init__(self, target: Llama, num_heads: int, num_layers: int) -> None:
        super().__init__()
        size = target.cfg.hidden_size
        self.blocks = nn.ParameterList(torch.zeros(size, size) for _ in range(num_heads))
        self.bias = nn.Parameter(torch.zeros(1, num_heads, size))
        self.layers, self.norm = copy.deepcopy(target.layers[:num_layers]), copy.deepcopy(target.norm)
        self.cfg = Config(**{**target.cfg.__dict__, "num_layers": len(self.layers)})  # of the draft model
        self.to(target.embed.weight.device, torch.float32).requires_grad_(True)

    def medusa(self, features: Tensor) -> Tensor:
        """[K, N, C] of features [N, C]: MedusaHeads' own forward, of our matrices."""
        with torch.device("meta"):
            heads = MedusaHeads(self.cfg.hidden_size, len(self.blocks))
        weights = {"weight": torch.stack(tuple(self.blocks))[None], "bias": self.bias}
        return functional_call(heads, weights, features)

    def draft(self, embedded: Tensor, rope: Tensor) -> Tensor:
        """The draft model's hidden states [B, T, C] of the tokens' embeddings, as Llama.forward has them."""
        for layer in self.layers:
            embedded = layer(embedded, rope, None, None, None)
        return self.norm(embedded)


class PeerTrainer(Trainer):
    """Agreements are the draft model's, then each head's. args.unroll is K: as many places ahead have a target."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        super().__init__(model, args)
        if self.device.type == "cuda":
            for layer in self.head.layers:
                layer.compile(dynamic=False)

    def new(self) -> Peers:
        return Peers(self.model, self.args.unroll, self.args.draft_layers)

    def losses(self, tokens: Tensor, counts: Tensor, features: Tensor, places: Tensor) -> tuple[Tensor, list[Tensor]]:
        """After place p the draft model guesses token p + 1, whose distribution feature p gives; head k guesses
        token p + k + 2, of feature p + k + 1. So all are one list, each a place further ahead."""
        args, rows, total, agreements = self.args, tokens.shape[1] - self.args.unroll - 1, 0.0, []
        with self.amp:
            hidden = self.head.draft(self.model.embed(tokens[:, :rows]), self.rope[:, :rows]).flatten(0, 1)[places]
            heads = self.head.medusa(features[:, :rows].flatten(0, 1)[places])
            for ahead, guess in enumerate((hidden, *heads)):
                loss, agree = self.distill(
                    guess, features[:, ahead:ahead + rows].flatten(0, 1)[places], self.model.lm_head.weight,
                    counts[:, ahead + 1:ahead + 1 + rows].flatten()[places], 0.0)
                total = total + args.decay ** max(ahead - 1, 0) * loss
                agreements.append(agree)
        return total, agreements

    def write(self) -> None:
        args, peers = self.args, self.head
        heads = MedusaHeads(peers.cfg.hidden_size, len(peers.blocks))
        heads.load_state_dict({"weight": torch.stack(tuple(peers.blocks))[None], "bias": peers.bias})
        save_medusa(heads.bfloat16(), args.medusa)
        save_draft_model(peers, args.checkpoint, args.draft_model, args.int8)


def save_draft_model(peers: Peers, checkpoint: Path, out: Path, int8: bool) -> None:
    """The target's config.json but for the number of layers, and the layers and final norm in bf16 or, as quantize.py
    has them, int8. No embedding and no lm_head: of a small target they would be most of the file."""
    draft, metadata = nn.ModuleDict({"layers": copy.deepcopy(peers.layers), "norm": peers.norm}), {"format": FORMAT}
    if int8:
        quantize_linears(draft, "int8")
        metadata |= {"mode": "int8", "group": "0"}
    tensors = {name: t.detach().to("cpu", None if name.endswith((".data", ".scale")) else torch.bfloat16)
               for name, t in draft.state_dict().items()}
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = len(peers.layers)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.part", metadata | {"embedding": "target"})
    (out / "model.part").replace(out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def agreement(model: Llama, draft: Llama, heads: MedusaHeads, data: Tensor) -> tuple[list[float], float]:
    """Over all places of the answers in data [dialogues, S]: how often the draft model's best token, then each head's,
    is the target's; and the draft model's overlap, sum of min(p, q) over the vocabulary: how often speculative
    sampling at temperature 1 accepts a token of it, after the text so far."""
    device, S = model.embed.weight.device, data.shape[1]
    model.rope, draft.rope = (rope_table(m.cfg, S, device).to(m.embed.weight.dtype) for m in (model, draft))
    places, agreed, count, overlap = torch.arange(S, device=device), 0, 0, 0.0
    for said in data.to(device, torch.int64):
        tokens = torch.where(said < 0, ~said, said)[None]
        features = model(tokens, places)[0]
        p = model.lm_head(features).float()
        best, hidden, agree, counts = p.argmax(-1), draft(tokens, places)[0], [], []
        for ahead, guess in enumerate((hidden, *heads(features))):
            q = draft.lm_head(guess).float()
            own = said[ahead + 1:] >= 0  # the token guessed is an answer's
            agree.append(((q.argmax(-1)[:S - ahead - 1] == best[ahead:S - 1]) & own).sum())
            counts.append(own.sum())
            if ahead == 0:
                overlap += (torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)[:-1] * own).sum().item()
        agreed, count = agreed + torch.stack(agree), count + torch.stack(counts)
    return (agreed / count).tolist(), overlap / count[0].item()


def parse_args() -> argparse.Namespace:
    p = options("Train Medusa heads and a draft model by self-distillation.")
    p.add_argument("--medusa", type=Path, help="where Medusa's heads go (default: <checkpoint>/medusa)")
    p.add_argument("--draft_model", type=Path, help="where the draft model goes (default: <checkpoint>/draft_model)")
    p.add_argument("--heads", type=int, default=4, dest="unroll", help="Medusa's heads")
    p.add_argument("--draft_layers", type=int, default=2, help="the draft model's layers")
    p.add_argument("--int8", action="store_true", help="write the draft model's matrices in int8: half the file")
    p.set_defaults(lr=2e-3)
    args = p.parse_args()
    args.medusa = args.medusa or args.checkpoint / "medusa"
    args.draft_model = args.draft_model or args.checkpoint / "draft_model"
    args.work = args.work or args.checkpoint / "training"
    return args


def main() -> None:
    args = parse_args()
    state = args.work / "peers"  # beside train.py's own; the dialogues are the same
    taken = [out for out in (args.medusa, args.draft_model) if out.exists()]
    if args.steps and taken and not (state / "state.pt").exists():
        sys.exit(f"error: {taken[0]} is there already; choose another folder or move it away")
    model, _, data = prepare(args)
    if args.steps:
        state.mkdir(exist_ok=True)
        trainer = PeerTrainer(model, args)
        trainer.resume(state)
        print("agreement: the draft model's, then that of each of Medusa's heads", flush=True)
        try:
            trainer.run(data[args.generate_batch:], state)  # the first batch, with its own seed, is held out
        except KeyboardInterrupt:
            trainer.write()
            print(f"stopped at step {trainer.step}: {args.medusa} and {args.draft_model} are written; "
                  "the same command goes on", file=sys.stderr)
            sys.exit(130)
    if args.eval_prompts:
        model = load_model(args.checkpoint, args.device, torch.bfloat16)
        draft, heads = load_draft_model(args.draft_model, model), load_medusa(args.medusa, model)
        agreed, overlap = agreement(model, draft, heads, data[:min(args.eval_prompts, args.generate_batch)])
        print(f"agreement on held-out dialogues: draft model {agreed[0]:.3f} (overlap at temperature 1 {overlap:.3f}), "
              "Medusa's heads " + " ".join(f"{a:.3f}" for a in agreed[1:]), flush=True)


if __name__ == "__main__":
    main()
