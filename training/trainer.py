"""Training of draft heads by distillation: the loss is the cross-entropy with the target's own distribution.

`Trainer` trains an EAGLE head (train.py). training/peers.py derives from it for Medusa heads and draft models.

Marked tokens (training/dialogues.py): token t of an answer is t, every other token is ~t. All tokens are context, but
only answers are learned.
"""
import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft import EagleHead
from formats.config import Config
from formats.eagle import save_head
from formats.weights import first_line
from formats.writing import replace_files
from model import Llama, load_model, rope_table
from tokenizer import Tokenizer
from training.dialogues import Script, unmark, write_dialogues

# ----- An EAGLE head, its draft steps and its loss -----------------------------------------------------------------


def new_head(cfg: Config, device: torch.device) -> EagleHead:
    """An untrained head for a target of this config. Its weights are small and random: at first the layer adds almost
    nothing, and fc passes on half of the feature."""
    cfg = Config(**{**cfg.__dict__, "num_layers": 1, "qk_norm": False, "tie_word_embeddings": False,
                    "sliding_window": None, "rope_scaling": None})
    head = EagleHead(cfg).to(device)
    for name, p in head.named_parameters():
        torch.nn.init.normal_(p, std={"layer.wqkv.weight": 0.01, "layer.w2.weight": 0.002}.get(name, 0.02))
    with torch.no_grad():
        head.layer.wo.weight.zero_()
        head.layer.mlp_norm.weight.fill_(1)
        head.fc.weight[:, cfg.hidden_size:] = 0.5 * torch.eye(cfg.hidden_size)
    return head


def unrolled(head: EagleHead, embedding: Tensor, features: Tensor, rope: Tensor, keys: list[Tensor],
             values: list[Tensor]) -> Tensor:
    """One draft step of the head for R positions at once: predicted features [B, R, C].

    embedding [B, R, C] of the tokens, features [B, R, C] of the step before, rope [2, R, D]. keys and values hold one
    entry [B, H, R, D] for each step, and get this step's. Row s of step j computes what drafting computes j steps after
    position s: it sees the first step's entries, made of true features, up to row s, and of each later step only its
    own row.
    """
    layer = head.layer
    x = head.fc(torch.cat((embedding, features), dim=-1))
    q, k, v = (y.transpose(1, 2) for y in layer.qkv(x, rope))  # [B, heads, R, D]
    groups = layer.num_heads // layer.num_kv_heads
    keys.append(k.repeat_interleave(groups, 1))
    values.append(v.repeat_interleave(groups, 1))
    rows = q.shape[2]
    causal = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    scores = [(q @ keys[0].transpose(-1, -2)).masked_fill(~causal, -torch.inf)]
    scores += [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
    weights = (torch.cat(scores, -1).float() * layer.head_dim**-0.5).softmax(-1).to(v.dtype)
    y = weights[..., :rows] @ values[0]
    for j, value in enumerate(values[1:]):
        y = y + weights[..., rows + j, None] * value
    x = x + layer.wo(y.transpose(1, 2).flatten(2))
    return layer.mlp(x)


def distill(predicted: Tensor, feature: Tensor, lm_head: Tensor, of_answer: Tensor,
            regression: float) -> tuple[Tensor, Tensor]:
    """The mean loss, and how often the best token is the target's, over those of N places that count.

    predicted and feature [N, C]: the head's and the target's. lm_head [V, C]. of_answer [N] bool: which places count,
    those whose next token belongs to an answer. regression: the weight of the distance between the features.
    """
    target = F.linear(feature, lm_head).detach().float()
    logits = F.linear(predicted, lm_head).float()
    cross_entropy = logits.logsumexp(-1) - (target.softmax(-1) * logits).sum(-1)
    distance = F.smooth_l1_loss(predicted.float(), feature.float(), reduction="none").mean(-1)
    share = of_answer / of_answer.sum().clamp(min=1)
    agree = logits.argmax(-1) == target.argmax(-1)
    return ((cross_entropy + regression * distance) * share).sum(), (agree * share).sum()


def compile_on_gpu(function: Callable, device: torch.device) -> Callable:
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


# ----- Training ----------------------------------------------------------------------------------------------------


class Trainer:
    """Trains `module`. Subclasses override what differs: `ahead`, `make_module`, `losses` and `export`."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        self.model = model
        self.args = args
        self.device = model.embed.weight.device
        self.module = self.make_module()
        self.step = 0
        self.seconds = 0.0
        self.rope = rope_table(self.module.cfg, args.length, self.device).bfloat16()
        matrices = [p for p in self.module.parameters() if p.ndim == 2]
        vectors = [p for p in self.module.parameters() if p.ndim != 2]
        self.optimizers = [
            # Muon's steps are all of one size. Without weight decay the weights grow tenfold, and learning stalls.
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0)]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.unrolled = compile_on_gpu(unrolled, self.device)
        self.distill = compile_on_gpu(distill, self.device)
        self.amp = torch.autocast(self.device.type, torch.bfloat16)
        model.allocate_rope(args.length)

    @property
    def ahead(self) -> int:
        """How many features ahead the last prediction lies: the draft steps that training unrolls."""
        return self.args.unroll

    def make_module(self) -> nn.Module:
        """What is trained, before training: a module with a `cfg`."""
        return new_head(self.model.cfg, self.device)

    def export(self) -> None:
        """Write what is trained in the format in which others load it."""
        save_head(self.module.cfg, self.module.state_dict(), self.args.out)

    def rows(self, tokens: Tensor) -> int:
        """How many positions of each dialogue, the first ones, have a target for every prediction. tokens [B, S]."""
        return tokens.shape[1] - self.ahead - 1

    def train_step(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on marked tokens [B, S]. Returns the loss, 0-d, and the agreement of each prediction with the
        target, [predictions].

        The loss looks at `args.places` random positions of the answers only. Its logits over the vocabulary are what a
        step spends its time on, and neighbouring positions teach much the same."""
        tokens = unmark(marked)
        of_answer = marked >= 0
        rows = self.rows(tokens)
        with torch.no_grad():
            features = self.model(tokens, torch.arange(tokens.shape[1], device=self.device))
            # A random number below 1, plus 1 where token s + 2, which follows feature s + 1, belongs to an answer
            priority = torch.rand_like(features[:, :rows, 0].float()) + of_answer[:, 2:2 + rows]
            places = priority.flatten().topk(min(self.args.places, rows * len(marked))).indices
        total, agreements = self.losses(tokens, of_answer, features, places)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule()
            optimizer.step()
            optimizer.zero_grad()
        return total.detach(), torch.stack(agreements)

    def losses(self, tokens: Tensor, of_answer: Tensor, features: Tensor, places: Tensor
               ) -> tuple[Tensor, list[Tensor]]:
        """The loss, summed over the predictions with their weights, and the agreement of each.

        tokens and of_answer [B, S]; features [B, S, C] are the target's; places [N] int64 are the positions that the
        loss looks at, as indices into the B * self.rows(tokens) flattened ones.
        """
        rows = self.rows(tokens)
        predicted = features[:, :rows]
        keys = []
        values = []
        total = 0.0
        agreements = []
        for j in range(1, self.ahead + 1):  # row s predicts feature s + j from token s + j, at RoPE position s + j - 1
            with self.amp:
                embedding = self.model.embed(tokens[:, j:j + rows])
                rope = self.rope[:, j - 1:j - 1 + rows]
                predicted = self.unrolled(self.module, embedding, predicted, rope, keys, values)
                loss, agree = self.distill(
                    predicted.flatten(0, 1)[places], features[:, j:j + rows].flatten(0, 1)[places],
                    self.model.lm_head.weight, of_answer[:, j + 1:j + 1 + rows].flatten()[places],
                    self.args.regression)
            total = total + self.args.decay ** (j - 1) * loss
            agreements.append(agree)
        return total, agreements

    def schedule(self) -> float:
        """The share of the peak learning rate: 100 steps of warm-up, then a cosine that ends with --steps or --minutes,
        whichever comes first."""
        progress = min(max(self.step / self.args.steps, self.seconds / (60 * self.args.minutes)), 1)
        return min((self.step + 1) / 100, 1) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def run(self, data: Tensor, work: Path) -> None:
        """Train on data [dialogues, S] int32, marked, until --steps or --minutes are over. Saves to the folder `work`
        every 30 seconds and at the end."""
        args = self.args
        losses = []
        agreements = []
        last = saved = time.perf_counter()
        start = last - self.seconds
        while self.step < args.steps and self.seconds < 60 * args.minutes:
            torch.manual_seed(self.step)  # a step has the same batch and places whether training was resumed or not
            rows = torch.randint(len(data), (args.batch,))
            loss, agreement = self.train_step(data[rows].to(self.device, torch.int64))
            losses.append(loss)
            agreements.append(agreement)
            self.step += 1
            self.seconds = time.perf_counter() - start
            if self.step % 100 == 0:
                speed = len(losses) * args.batch * args.length / (time.perf_counter() - last)
                print(f"step {self.step}  {self.seconds:.0f} s  loss {torch.stack(losses).mean():.3f}  agreement "
                      + " ".join(f"{a:.3f}" for a in torch.stack(agreements).mean(0).tolist())
                      + f"  {speed:,.0f} tokens/s", flush=True)
                losses = []
                agreements = []
                last = time.perf_counter()
            if time.perf_counter() - saved > 30:
                saved = time.perf_counter()
                self.save(work)
        self.save(work)

    def save(self, work: Path) -> None:
        """Write the state of training to the folder `work`, and export what is trained."""
        state = {"step": self.step, "seconds": self.seconds, "head": self.module.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        with replace_files(work) as part, open(part / "state.pt", "wb") as file:
            torch.save(state, file)  # by its name, torch.save reports a full disk as a RuntimeError
        self.export()

    def resume(self, work: Path) -> None:
        """Go on from what `save` wrote to this folder, if there is anything."""
        path = work / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.module.load_state_dict(state["head"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
            self.seconds = state["seconds"]
        except Exception as error:  # a damaged pickle can raise any exception
            raise ValueError(f"{path}: damaged, or of a training with other options ({first_line(error)}): move it "
                             "away, or choose another --work") from error
        print(f"resuming at step {self.step}", flush=True)


# ----- What the commands share -------------------------------------------------------------------------------------


def options(description: str) -> argparse.ArgumentParser:
    """The options of every training command: the target, its dialogues, how long to train."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--checkpoint", type=Path, required=True, help="folder of the converted target model")
    p.add_argument("--work", type=Path, help="dialogues and training state (default: <checkpoint>/training)")
    p.add_argument("--tokens", type=float, default=40e6, help="dialogue tokens that the model writes")
    p.add_argument("--steps", type=int, default=10000, help="end training after this many steps; 0: do not train, only "
                   "evaluate what is there already")
    p.add_argument("--minutes", type=float, default=math.inf, help="end training after this time, if that comes sooner")
    p.add_argument("--length", type=int, default=640, help="tokens of a dialogue")
    p.add_argument("--batch", type=int, default=32, help="dialogues per training step")
    p.add_argument("--generate_batch", type=int, default=2048, help="dialogues written at the same time")
    p.add_argument("--decay", type=float, default=0.8, help="weight in the loss of each draft step, or position ahead, "
                   "relative to the one before")
    p.add_argument("--places", type=int, default=8192, help="positions per training step that the loss looks at")
    p.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (Muon)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--eval_prompts", type=int, default=80, help="held-out dialogues to evaluate on; 0: do not evaluate")
    return p


def prepare(args: argparse.Namespace) -> tuple[Llama, Tokenizer, Tensor]:
    """The target, its tokenizer, and its dialogues [rows, length] int32, marked. Writes those that are missing."""
    torch.set_float32_matmul_precision("high")
    model = load_model(args.checkpoint, args.device, torch.bfloat16)
    tokenizer = Tokenizer(args.checkpoint)
    script = Script(tokenizer, model.embed.weight.device)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":  # compiled once for all layers: their shapes are the same
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=False)
    path = args.work / "dialogues.bin"
    rows = max(int(args.tokens / args.length), args.generate_batch + args.batch)
    check_dialogues(path, script, args.length)
    write_dialogues(model, script, path, rows, args.length, args.generate_batch)
    dialogues = torch.from_file(str(path), size=rows * args.length, dtype=torch.int32)
    return model, tokenizer, dialogues.view(rows, args.length)


def check_dialogues(path: Path, script: Script, length: int) -> None:
    """Raise ValueError if a file of dialogues was written with another length of rows or for another model, as far as
    their first tokens tell."""
    rows = min(path.stat().st_size // (4 * length), 100) if path.exists() else 0
    if not rows:
        return
    first = ~torch.from_file(str(path), size=rows * length, dtype=torch.int32).view(rows, length)[:, 0].long()
    if not torch.isin(first, script.forced[:max(script.openers, 1), 0].cpu()).all():
        raise ValueError(f"{path}: its dialogues are of another --length or another model: move it away, or choose "
                         "another --work")
