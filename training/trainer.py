"""Training of draft heads, by the distributions of the target."""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draft import EagleHead
from formats.config import Config
from formats.eagle import save_head
from model import Llama, load_model, rope_table
from tokenizer import Tokenizer
from training.dialogues import Script, write_dialogues


def new_head(cfg: Config, device: torch.device) -> EagleHead:
    """Small random weights; the layer adds almost nothing at first, and fc passes half of the feature on."""
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
    """One unrolled step for all rows at once. Row s guesses as it would at draft step j after place s: it sees
    the true-feature entries up to s (keys[0]) and its own entry of each later step. Extends keys and values."""
    layer = head.layer
    x = head.fc(torch.cat((embedding, features), dim=-1))
    q, k, v = (y.transpose(1, 2) for y in layer.qkv(x, rope))  # [B, heads, R, D]
    groups = layer.num_heads // layer.num_kv_heads
    keys.append(k.repeat_interleave(groups, 1))
    values.append(v.repeat_interleave(groups, 1))
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = [(q @ keys[0].transpose(-1, -2)).masked_fill(~causal, -torch.inf)]
    scores += [(q * key).sum(-1, keepdim=True) for key in keys[1:]]
    weights = (torch.cat(scores, -1).float() * layer.head_dim**-0.5).softmax(-1).to(v.dtype)
    y = weights[..., :q.shape[2]] @ values[0]
    for j, value in enumerate(values[1:]):
        y = y + weights[..., q.shape[2] + j, None] * value
    x = x + layer.wo(y.transpose(1, 2).flatten(2))
    return layer.mlp(x)


def distill(guess: Tensor, feature: Tensor, lm_head: Tensor, counts: Tensor,
            regression: float) -> tuple[Tensor, Tensor]:
    """Loss and top-1 agreement over N places. guess, feature [N, C]; counts [N] bool: which places count."""
    target, logits = F.linear(feature, lm_head).detach().float(), F.linear(guess, lm_head).float()
    cross_entropy = logits.logsumexp(-1) - (target.softmax(-1) * logits).sum(-1)
    off = F.smooth_l1_loss(guess.float(), feature.float(), reduction="none").mean(-1)
    share = counts / counts.sum().clamp(min=1)
    agree = logits.argmax(-1) == target.argmax(-1)
    return ((cross_entropy + regression * off) * share).sum(), (agree * share).sum()


class Trainer:
    """An EAGLE head's training; train_peers.py has others in its place."""

    def __init__(self, model: Llama, args: argparse.Namespace) -> None:
        self.model, self.args, self.device = model, args, model.embed.weight.device
        self.head, self.step, self.seconds = self.new(), 0, 0.0
        self.rope = rope_table(self.head.cfg, args.length, self.device).bfloat16()
        matrices = [p for p in self.head.parameters() if p.ndim == 2]
        vectors = [p for p in self.head.parameters() if p.ndim != 2]
        self.optimizers = [
            # Without weight decay Muon's steps, all of one size, let the weights grow tenfold, and learning stalls.
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(vectors, lr=args.lr / 5, betas=(0.9, 0.95), weight_decay=0.0)]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        compiled = (lambda f: torch.compile(f, dynamic=False)) if self.device.type == "cuda" else (lambda f: f)
        self.unrolled, self.distill = compiled(unrolled), compiled(distill)
        model.allocate_rope(args.length)
        self.amp = torch.autocast(self.device.type, torch.bfloat16)

    def new(self) -> nn.Module:
        """What is to be trained, untrained: a module with a `cfg`."""
        return new_head(self.model.cfg, self.device)

    def write(self) -> None:
        """What is trained, for others to load."""
        save_head(self.head.cfg, self.head.state_dict(), self.args.out)

    def train_step(self, said: Tensor) -> tuple[Tensor, Tensor]:
        """said [B, S]: tokens, as ~token where the loss does not count them. Returns loss and agreements [unroll].

        The loss is taken at `args.places` random places of the answers: its logits over the vocabulary are what
        a step spends its time on, and neighbouring places tell much the same."""
        args, tokens = self.args, torch.where(said < 0, ~said, said)
        rows = tokens.shape[1] - args.unroll - 1  # the places that have a target at every unrolled step
        counts = said >= 0
        with torch.no_grad():
            features = self.model(tokens, torch.arange(tokens.shape[1], device=self.device))
            places = (torch.rand_like(features[:, :rows, 0].float()) + counts[:, 2:2 + rows]).flatten().topk(
                min(args.places, rows * len(said))).indices
        total, agreements = self.losses(tokens, counts, features, places)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule()
            optimizer.step()
            optimizer.zero_grad()
        return total.detach(), torch.stack(agreements)

    def losses(self, tokens: Tensor, counts: Tensor, features: Tensor, places: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The weighted loss, and the agreements with the target. tokens, counts [B, S], features [B, S, C], places [N]
        of the B * (S - unroll - 1) that have a target at every unrolled step."""
        args, rows = self.args, tokens.shape[1] - self.args.unroll - 1
        guess, keys, values, total, agreements = features[:, :rows], [], [], 0.0, []
        for j in range(1, args.unroll + 1):  # row s: entry s + j - 1, token s + j, guesses feature s + j
            with self.amp:
                embedding = self.model.embed(tokens[:, j:j + rows])
                guess = self.unrolled(self.head, embedding, guess, self.rope[:, j - 1:j - 1 + rows], keys, values)
                loss, agree = self.distill(
                    guess.flatten(0, 1)[places], features[:, j:j + rows].flatten(0, 1)[places],
                    self.model.lm_head.weight, counts[:, j + 1:j + 1 + rows].flatten()[places], args.regression)
            total = total + args.decay ** (j - 1) * loss
            agreements.append(agree)
        return total, agreements

    def schedule(self) -> float:
        """Warm-up, then a cosine that ends with --steps or --minutes, whichever comes first."""
        progress = min(max(self.step / self.args.steps, self.seconds / (60 * self.args.minutes)), 1)
        return min((self.step + 1) / 100, 1) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def run(self, data: Tensor, work: Path) -> None:
        args, losses, agreements = self.args, [], []
        last = saved = time.perf_counter()
        start = last - self.seconds
        while self.step < args.steps and self.seconds < 60 * args.minutes:
            torch.manual_seed(self.step)  # the same batch and places for the same step, resumed or not
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
                losses, agreements, last = [], [], time.perf_counter()
            if time.perf_counter() - saved > 30:
                saved = time.perf_counter()
                self.save(work)
        self.save(work)

    def save(self, work: Path) -> None:
        state = {"step": self.step, "seconds": self.seconds, "head": self.head.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        torch.save(state, work / "state.part")
        (work / "state.part").replace(work / "state.pt")
        self.write()

    def resume(self, work: Path) -> None:
        if (work / "state.pt").exists():
            state = torch.load(work / "state.pt", map_location=self.device, weights_only=True)
            self.head.load_state_dict(state["head"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"resuming at step {self.step}", flush=True)


def options(description: str) -> argparse.ArgumentParser:
    """What every training asks for: the target, its dialogues, how long."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--checkpoint", type=Path, required=True, help="folder of the converted target model")
    p.add_argument("--work", type=Path, help="dialogues and training state (default: <checkpoint>/training)")
    p.add_argument("--tokens", type=float, default=40e6, help="dialogue tokens to generate")
    p.add_argument("--steps", type=int, default=10000, help="end training after so many steps; 0: none, but what is "
                   "there already is evaluated")
    p.add_argument("--minutes", type=float, default=math.inf, help="end training after this time, if sooner")
    p.add_argument("--length", type=int, default=640, help="tokens a dialogue")
    p.add_argument("--batch", type=int, default=32, help="dialogues a training step")
    p.add_argument("--generate_batch", type=int, default=2048, help="dialogues written side by side")
    p.add_argument("--decay", type=float, default=0.8, help="weight of each unrolled step, or place ahead, against the "
                   "one before")
    p.add_argument("--places", type=int, default=8192, help="places a step that the loss looks at")
    p.add_argument("--lr", type=float, default=5e-3, help="peak learning rate (Muon)")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--eval_prompts", type=int, default=80, help="held-out dialogues to evaluate on; 0: no evaluation")
    return p


def prepare(args: argparse.Namespace) -> tuple[Llama, Tokenizer, Tensor]:
    """The target, its tokenizer, and its dialogues [rows, length] int32, written where they are not there yet."""
    torch.set_float32_matmul_precision("high")
    model = load_model(args.checkpoint, args.device, torch.bfloat16)
    tokenizer = Tokenizer(args.checkpoint)
    script = Script(tokenizer, model.embed.weight.device)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":  # one layer compiled once serves them all
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=False)
    path, rows = args.work / "dialogues.bin", max(int(args.tokens / args.length), args.generate_batch + args.batch)
    write_dialogues(model, script, path, rows, args.length, args.generate_batch)
    return model, tokenizer, torch.from_file(str(path), size=rows * args.length, dtype=torch.int32).view(
        rows, args.length)
