"""Training of draft heads by distillation: the loss is the cross-entropy with the target's own distribution.

`Trainer` trains an EAGLE-1/2 head (train.py). Trainers that derive from it: training/eagle3.py for EAGLE-3 heads,
training/block.py for block heads, training/peers.py for Medusa heads and draft models.

Marked tokens (training/dialogues.py): token t of an answer is t, every other token is ~t. All tokens are context, but
only answers are learned.
"""
import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from formats.config import Config
from formats.eagle import VOCAB, save_head
from formats.weights import first_line
from formats.writing import replace_files, write_text
from model import Llama, rope_table
from training.dialogues import unmark
from training.exported import exporting
from training.steps import Replay, compile_on_gpu, distill, in_parts, new_head, shares, unrolled

AGREEMENTS = "curve.json"  # beside the state: the agreement on held-out dialogues while the head was trained
DRAFT_VOCAB = 16384  # tokens to draft, where --draft_vocab does not say how many
BAR = "{desc} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"


class Trainer:
    """Trains `module`. Subclasses override what differs: the three fields below, `check`, `listed`,
    `layer_config`, `ahead`, `kept_rows`, `make_module`, `predict` or `losses`, `export`, `folders` and `resume`.

    data [dialogues, S] int32, marked: those to train on. held_out [any, S]: a few others, to measure agreement on."""
    own_options: tuple[str, ...] = ("regression",)  # options of train.py that are for this kind of head alone
    taps: tuple[int, ...] = ()  # layers that the head reads instead of the features (Llama.forward_with_taps)
    by_token: tuple[str, ...] = ()  # parameters with one row for each token

    def __init__(self, model: Llama, args: argparse.Namespace, data: Tensor | None = None,
                 held_out: Tensor | None = None) -> None:
        self.model = model
        self.args = args
        self.data = data
        self.held_out = held_out
        self.device = model.embed.weight.device
        model.allocate_rope(args.length)
        self.module = self.make_module()
        self.step = 0
        self.seconds = 0.0
        self.curve: list[dict] = []  # what was measured on held_out
        self.rope = rope_table(self.layer_config, args.length, self.device).bfloat16()
        named = dict(self.module.named_parameters())
        rows = [named.pop(name) for name in self.by_token]
        matrices = [p for p in named.values() if p.ndim == 2]
        vectors = [p for p in named.values() if p.ndim != 2]
        adam = [{"params": vectors, "lr": args.lr / 5}, {"params": rows, "lr": args.lr / 20}]
        self.optimizers = [
            # Muon's steps are all of one size. Without weight decay the weights grow tenfold, and learning stalls.
            torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adam[:1 + bool(rows)], betas=(0.9, 0.95), weight_decay=0.0)]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
        self.target_rows = model.lm_head.weight  # those that the head learns from, [any, C]
        self.unrolled = compile_on_gpu(unrolled, self.device)
        self.distill = compile_on_gpu(distill, self.device)
        self.amp = torch.autocast(self.device.type, torch.bfloat16)
        self.replay: Replay | None = None  # on a GPU: CUDA graph of compute_gradients, see `gradients`

    @staticmethod
    def check(args: argparse.Namespace, target: Config) -> None:
        """Raise ValueError for options that do not fit this target, before anything is written."""
        check_ahead("unroll", args.unroll, args.length)
        if args.draft_vocab and not 10 <= args.draft_vocab <= target.vocab_size:
            raise ValueError(f"--draft_vocab takes 10 to {target.vocab_size} tokens, or 0 for all that the model has")

    @classmethod
    def listed(cls, args: argparse.Namespace, target: Config) -> int:
        """How many tokens are to be listed in draft_vocab.json beside the head; 0: no list is written. Without
        --draft_vocab a head that is trained gets a list, if it has none yet."""
        if args.draft_vocab is not None:
            return args.draft_vocab
        wanted = args.steps and target.vocab_size > DRAFT_VOCAB and not (args.out / VOCAB).exists()
        return DRAFT_VOCAB if wanted else 0

    @property
    def layer_config(self) -> Config:
        """The sizes of the layers that are trained."""
        return self.module.cfg

    @property
    def ahead(self) -> int:
        """How many features ahead the last prediction lies: the draft steps that training unrolls."""
        return self.args.unroll

    def kept_rows(self, batch: int) -> tuple[int, int, int]:
        """For the memory estimate of a step with `batch` dialogues: the number of passes through the module, the rows
        of each layer over all passes, and the rows of logits of one pass. One extra pass stands for the gradients of
        the pass that backward is in."""
        passes = self.ahead + 1
        rows = batch * (self.args.length - passes)
        return passes, passes * rows, min(self.args.places, rows)

    def make_module(self) -> nn.Module:
        """What is trained, before training: a module with a `cfg`."""
        return new_head(self.model.cfg, self.device)

    def export(self) -> None:
        """Write what is trained in the format in which others load it."""
        save_head(self.module.cfg, self.module.state_dict(), self.args.out)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where `export` writes."""
        return (self.args.out,)

    def rows(self, tokens: Tensor) -> int:
        """How many positions of each dialogue, the first ones, are learned from: those that have a target for every
        prediction. More than 64 are cut to whole eights, for which matrix products are fastest. tokens [B, S]."""
        rows = tokens.shape[1] - self.ahead - 1
        return rows - rows % 8 if rows > 64 else rows

    def train_step(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step on marked tokens [B, S]. Returns what `predict` returns."""
        found = self.gradients(marked)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * self.schedule()
            optimizer.step()
        return found

    def gradients(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gradients on marked tokens [B, S], of the same shape in all calls. Those of the last step are
        replaced. Returns what `predict` returns."""
        if self.device.type != "cuda":
            return self.compute_gradients(marked)
        if self.replay is None:
            # The first step of a process draws the same places as one that is only replayed.
            with torch.random.fork_rng([torch.cuda.current_device()]):
                self.compute_gradients(marked)
            self.module.zero_grad()  # the graph has gradients of its own
            self.replay = Replay(self.compute_gradients, marked)
        return self.replay(marked)

    def compute_gradients(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        self.module.zero_grad()
        total, agreements = self.predict(marked)
        total.backward()
        return total.detach(), agreements

    def predict(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, 0-d, on marked tokens [B, S], and for each draft step the agreement, [predictions]: the share (0 to
        1) of the answer positions used where the head's argmax is the target's. Some gradients are added to .grad here,
        the others come with the loss's backward pass: see in_parts.
        Only `args.places` random positions of all answers are used: logits over the vocabulary take much of a
        step's time, and neighbouring positions teach much the same."""
        tokens = unmark(marked)
        of_answer = marked >= 0
        rows = self.rows(tokens)
        with torch.no_grad():
            positions = torch.arange(tokens.shape[1], device=self.device)
            features, taps = self.model.forward_with_taps(tokens, positions, taps=self.taps)
            # A random number below 1, plus 1 where token s + 2, which follows feature s + 1, belongs to an answer
            priority = torch.rand_like(features[:, :rows, 0].float()) + of_answer[:, 2:2 + rows]
            places = priority.flatten().topk(min(self.args.places, rows * len(marked))).indices
        total, agreements = self.losses(tokens, of_answer, features, taps, places)
        return total, torch.stack(agreements)

    def losses(self, tokens: Tensor, of_answer: Tensor, features: Tensor, taps: Tensor | None, places: Tensor
               ) -> tuple[Tensor, list[Tensor]]:
        """The loss, summed over the predictions with their weights, and the agreement of each.

        tokens and of_answer [B, S]; features [B, S, C] and, with self.taps, taps [B, S, k * C] are the target's; places
        [N] int64 are the positions that the loss looks at, as indices into the B * self.rows(tokens) flattened ones.
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
                share = shares(of_answer[:, j + 1:j + 1 + rows].flatten()[places])
                loss, agree = in_parts(partial(self.distill, self.target_rows, self.args.regression),
                                       len(self.target_rows), self.args.decay ** (j - 1) * share,
                                       predicted.flatten(0, 1)[places],
                                       features[:, j:j + rows].flatten(0, 1)[places])
            total = total + loss
            agreements.append((agree * share).sum())
        return total, agreements

    def progress(self) -> float:
        """How much of the training is done, 0 to 1: it ends with --steps or --minutes, whichever comes first."""
        args = self.args
        return min(max(self.step / args.steps, self.seconds / (60 * args.minutes) if args.minutes else 1), 1)

    def schedule(self) -> float:
        """The share of the peak learning rate: 100 steps of warm-up, then a cosine."""
        return min((self.step + 1) / 100, 1) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.progress())))

    def run(self, data: Tensor, work: Path) -> None:
        """Train on data [dialogues, S] int32, marked, until --steps or --minutes are over. Saves to the folder `work`
        every 30 seconds and at the end; the state of a large head, which takes seconds to write, less often."""
        args = self.args
        pause = max(30, 6e-7 * sum(p.numel() for p in self.module.parameters()))
        losses = []
        agreements = []
        last = saved = time.perf_counter()
        start = last - self.seconds
        with tqdm(total=1, initial=self.progress(), desc="training", bar_format=BAR, disable=None, leave=False) as bar:
            while self.step < args.steps and self.seconds < 60 * args.minutes:
                torch.manual_seed(self.step)  # a step has the same batch and places whether training was resumed or not
                rows = torch.randint(len(data), (args.batch,))
                loss, agreement = self.train_step(data[rows].to(self.device, torch.int64))
                losses.append(loss)
                agreements.append(agreement)
                self.step += 1
                self.seconds = time.perf_counter() - start
                bar.update(self.progress() - bar.n)
                if self.step % 100 == 0:
                    speed = len(losses) * args.batch * args.length / (time.perf_counter() - last)
                    line = self.report(work, torch.stack(losses).mean().item(), torch.stack(agreements).mean(0), speed)
                    with bar.external_write_mode():
                        print(line, flush=True)
                    losses = []
                    agreements = []
                    last = time.perf_counter()
                if time.perf_counter() - saved > pause:
                    saved = time.perf_counter()
                    self.save(work)
        self.save(work)

    def report(self, work: Path, loss: float, agreement: Tensor, speed: float) -> str:
        """A line about the last 100 steps. Measures the agreement on held-out dialogues where it is time to."""
        line = (f"step {self.step}  {self.seconds:.0f} s  loss {loss:.3f}  agreement {numbers(agreement)}  "
                f"{speed:,.0f} tokens/s")
        if self.held_out is None or not self.args.held_out or self.step % rounded_up(self.args.held_out, 100):
            return line
        return f"{line}  held out {numbers(self.measure(work))}"

    def measure(self, work: Path) -> Tensor:
        """The agreement on held-out dialogues, [predictions], which with the loss is also added to the curve in `work`.
        (No gradients are needed. But the function for a training step is there already.)"""
        torch.manual_seed(0)  # the same places each time
        rows = torch.arange(self.args.batch) % len(self.held_out)
        loss, agreement = self.gradients(self.held_out[rows].to(self.device, torch.int64))
        self.curve.append({"step": self.step, "seconds": round(self.seconds), "loss": round(loss.item(), 4),
                           "agreement": [round(a, 4) for a in agreement.tolist()]})
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / AGREEMENTS, "[" + ",\n ".join(map(json.dumps, self.curve)) + "]\n")
        return agreement

    def save(self, work: Path) -> None:
        """Write the state of training to the folder `work`, and export what is trained."""
        state = {"step": self.step, "seconds": self.seconds, "head": self.module.state_dict(),
                 "config": repr(self.module.cfg),
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        with replace_files(work) as part, open(part / "state.pt", "wb") as file:
            torch.save(state, file)  # by its name, torch.save reports a full disk as a RuntimeError
        with exporting(work, *self.folders):
            self.export()

    def resume(self, work: Path) -> None:
        """Load what `save` wrote to this folder, if anything, with this run's learning rates. ValueError if damaged."""
        path = work / "state.pt"
        config = repr(self.module.cfg)
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            if state.get("config", config) != config:
                raise ValueError("its head has another config")
            self.module.load_state_dict(state["head"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                rates = [group["initial_lr"] for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, rate in zip(optimizer.param_groups, rates):
                    group["initial_lr"] = rate
            self.step = state["step"]
            self.seconds = state["seconds"]
            if (work / AGREEMENTS).exists():
                path = work / AGREEMENTS
                self.curve = [row for row in json.loads(path.read_text()) if row["step"] <= self.step]
        except Exception as error:  # a damaged pickle can raise any exception
            raise ValueError(f"{path}: damaged, or of a training with other options ({first_line(error)}): move it "
                             "away, or choose another --work") from error
        print(f"resuming at step {self.step}", flush=True)


def numbers(agreement: Tensor) -> str:
    return " ".join(f"{a:.3f}" for a in agreement.tolist())


def rounded_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def check_ahead(option: str, ahead: int, length: int) -> None:
    """Raise ValueError if predictions this far ahead leave no position of a dialogue to learn from."""
    if not 1 <= ahead <= length - 2:
        raise ValueError(f"--{option} {ahead} does not fit into dialogues of --length {length}: it takes 1 to "
                         f"{length - 2}")
