"""The engine: a model, a drafter and one sequence, decoded cycle by cycle.

Each cycle a drafter proposes a tree of continuations (drafter.py), one forward of the target over all its nodes
says what the target would have written after each, and the longest path that agrees is committed, with one
bonus token (tree.py). Vanilla decoding is the same cycle with a tree of one node.

Everything in a cycle has a static shape and lives on the device: lengths, positions, masks, the stop test. So on a
GPU a cycle is one CUDA graph, whatever the prompt, and the host does nothing but replay it and read what it committed.

    engine = Engine(load_model("checkpoints/org/name", "cuda"), Vanilla("cuda"), max_seq_len=2048)
    for tokens in engine.generate([1, 2, 3], max_new_tokens=100): ...
"""
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from draft import Drafter, Vanilla, tree_ops
from model import Llama
from ops.attention import causal_mask, tree_mask
from ops.graphs import capture
from ops.linear import MAX_ROWS, linear
from ops.quantized import Quantized
from sampling import Sampling, gumbel_noise, perturb, process
from tree import MAX_NODES, State, Tree, build

PREFILL_CHUNK = 512  # prompt tokens a forward
SHORT_CHUNK = MAX_ROWS  # on a GPU, for what is left of a prompt: it costs what a verification does
SPARE = 128  # cache slots past max_seq_len, for drafts that reach beyond the last token to be committed


def parted(ids: list[int], others: list[int]) -> int:
    """The place of the first token that differs; where one text ends before the other, its length."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


class Engine:
    """A model, a drafter and the state of one sequence. Call `generate` again and again, one at a time: a new one ends
    an older one that has not finished, on this engine or on another that shares the model. To stop early is harmless.

    On a GPU a cycle is one CUDA graph: the host enqueues the next replay before it reads what the last one
    committed, so the GPU never waits for Python. `compiled=False` launches every kernel from Python instead,
    which is slow but can be stepped through."""
    def __init__(self, model: Llama, drafter: Drafter, max_seq_len: int,
                 stop_ids: frozenset[int] = frozenset(), compiled: bool = True) -> None:
        self.model, self.drafter, self.max_seq_len = model, drafter, max_seq_len
        self.device = device = model.embed.weight.device
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)
        self.slots, self.compile_s = max_seq_len + SPARE, 0.0
        if model.kv is None or model.kv.shape[4] < self.slots:
            model.allocate_cache(max_seq_len, SPARE)
        drafter.allocate(self.slots)
        self.cuda = device.type == "cuda"
        self.steps = tree_ops(device)
        self.graphs, self.caches = {} if self.cuda and compiled else None, []
        rows, self.deepest = drafter.max_depth + 1, drafter.deepest or drafter.max_depth
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.limit, self.first = zero + 1, zero.clone()
        self.nodes = torch.arange(MAX_NODES, device=device)
        self.state = State(
            tokens=torch.zeros(self.slots + 1, dtype=torch.int64, device=device), length=zero + 2, committed=zero + 1,
            features=model.embed.weight.new_zeros(rows, model.cfg.hidden_size), done=zero == 0, width=self.slots,
            seed=zero.clone(), sampling=Sampling())
        self.report = torch.zeros(rows + 2, dtype=torch.int64, device=device)  # see tree.accept_commit
        # The host's copies, of the cycle it reads and of the one that runs meanwhile
        self.inbox = torch.zeros(2, rows + 2, dtype=torch.int64, pin_memory=self.cuda)
        self.arrived = [torch.cuda.Event(), torch.cuda.Event()] if self.cuda else None
        self.features = model.embed.weight.new_zeros(min(PREFILL_CHUNK, max_seq_len), model.cfg.hidden_size)
        self.short = min(SHORT_CHUNK, len(self.features))
        # So many tokens short chunks process sooner than a large one, which dequantises first (BENCHMARKS.md)
        self.few = (5 if isinstance(model.lm_head.weight, Quantized) else 2) * self.short
        self.text, self.mark, self.reused = [], None, 0  # see `forget`; prompt tokens that were not processed anew

    def check(self, ids: list[int]) -> None:
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(ids)} tokens and --max_seq_len {self.max_seq_len} leaves no room "
                             f"for more (the model was made for {self.model.cfg.max_position_embeddings})")

    def forget(self, text: list[int] | None = None) -> None:
        """Another sequence begins, of which the caches hold `text`. self.text: all that the host knows to be committed,
        self.mark: of which sequence. Caches may be shared, so each carries the mark of who wrote it last."""
        self.text, self.mark = text or [], object()
        for written in (self.model.kv, *self.drafter.caches()):
            written.writer = self.mark

    def holds(self, mark: object) -> bool:
        """Whether the sequence of this mark is still the one in the caches."""
        caches = (self.model.kv, *self.drafter.caches())
        return mark is self.mark and all(getattr(written, "writer", None) is mark for written in caches)

    def reusable(self, ids: list[int]) -> int:
        """How many slots hold already what prefill would write for `ids`: those of the tokens that the last text begins
        with too, but for the last one of these, since a head's entry is made with the token after it (and prefill
        wants a feature of the prompt's last). A drafter learns what a cycle committed in the next one, so the end of
        the text does not count either. A cycle that ran ahead, or was interrupted, writes to no slot before that."""
        if not self.holds(self.mark):
            return 0
        return max(0, min(parted(ids, self.text) - 1, len(self.text) - self.drafter.max_depth - 2))

    def chain(self, rows: int) -> Tree:
        """So many nodes, one below the other, of any tokens."""
        return build(self.state.tokens[:rows].clone(), (self.nodes[:rows] - 1).clamp(min=0), rows - 1)

    def compile(self, *rows: int) -> None:
        """Compile the kernels of prefill, drafting, and verifying so many rows, by running each on any tokens in a
        thread of its own: nearly all of the time is spent outside of Python's lock. Commits nothing."""
        self.forget()
        self.first.zero_()  # from anywhere else a chunk might reach past the caches
        self.state.sampling, self.state.noise = Sampling(), None  # noise reaches no further than a drafter's nodes
        base = self.state.length - 1
        jobs = [partial(self.drafter.propose, self.state), partial(self.chunk, self.short, self.slots),
                *(partial(self.verify, base, self.chain(n)) for n in rows)]
        with ThreadPoolExecutor(len(jobs)) as pool:
            futures = [pool.submit(torch.inference_mode()(job)) for job in jobs]
            torch.inference_mode()(self.chunk)(len(self.features), self.slots)  # here: cuBLAS has a workspace a thread
        for future in futures:
            future.result()

    def warm_up(self, sampling: Sampling) -> None:
        """Run a few cycles, so that what happens once (compilation, capture, allocation) is not timed as decoding."""
        start = time.perf_counter()
        if self.cuda:
            self.compile(self.drafter.num_nodes)
        for _ in self.generate([0] * min(8, self.max_seq_len - 1), 8, sampling):
            pass
        self.compile_s = time.perf_counter() - start

    def captured(self, function: Callable[[], None], *key: object) -> Callable[[], None]:
        """`function` as a CUDA graph, captured the first time it is asked for with this key; as it is on a CPU."""
        if self.graphs is None:
            return function
        caches = [self.model.kv, *self.drafter.caches()]
        if [*map(id, caches)] != [*map(id, self.caches)]:  # replaced by another engine that shares them
            self.graphs.clear()
            self.caches = caches
        if key not in self.graphs:
            self.graphs[key] = capture(function)
        return self.graphs[key]

    @torch.inference_mode()
    def prefill(self, ids: list[int], max_new_tokens: int, sampling: Sampling, start: int = 0) -> State:
        """Process the prompt from token `start` on and commit the first new token. Raises ValueError where it does not
        fit."""
        self.check(ids)
        state, n, self.reused = self.state, len(ids), start
        state.sampling = sampling
        state.seed.fill_(sampling.seed)
        self.limit.fill_(min(n + max_new_tokens, self.max_seq_len))
        state.tokens[:n].copy_(torch.tensor(ids))
        state.length.fill_(n)
        self.drafter.reset(state)
        first, features = self.chunks(ids, start)
        self.text = list(ids)
        state.committed.fill_(0)
        state.done.fill_(False)
        state.features[0] = features[n - 1 - first]
        self.draw_noise()
        root = Vanilla(self.device).propose(state)
        self.accept(root, self.choose(state.features[:1], root), 0)
        return state

    def chunks(self, ids: list[int], start: int = 0) -> tuple[int, Tensor]:
        """Run the prompt from token `start` on through model and draft head. Returns the place of the last chunk and
        its features."""
        rows, n = len(self.features), len(ids)
        self.forget(ids[:start])
        if not self.cuda:
            for first in range(start, n, rows):
                self.first.fill_(first)
                count = min(rows, -(-(n - first) // 16) * 16)  # oneDNN keeps kernels for every shape that it ever saw
                self.chunk(count, min(-(-(first + count) // 128) * 128, self.slots))
            return first, self.features
        short = self.short
        self.first.zero_()  # to capture is to run it, see `compile`
        chunks = {size: self.captured(partial(self.chunk, size, self.slots), "chunk", size) for size in (short, rows)}
        while start < n:  # two shapes for every prompt
            size = short if n - start <= self.few else rows
            self.first.fill_(first := min(start, self.slots - size))
            chunks[size]()
            start += size
        return first, self.features

    def chunk(self, rows: int, width: int) -> None:
        """Fill the cache slots of tokens `first` to first + rows, the head's too, and `features`. What lies past the
        prompt is written over before anyone reads it, as is the head's last entry, whose token is not chosen yet."""
        slots = self.first + torch.arange(rows, device=self.device)
        mask = causal_mask(self.first, rows, width)
        features = self.model(self.state.tokens[slots][None], slots, slots, mask)[0]
        self.features[:rows].copy_(features)
        self.drafter.prefill(self.state, features, slots, mask)

    def choose(self, features: Tensor, tree: Tree) -> Tensor:
        """The target's next token after each node, [T] int64. features [T, C] of the nodes of `tree`."""
        s = self.state.sampling
        if s.temperature and self.drafter.rejection:
            logits = linear(features, self.model.lm_head.weight, dtype=torch.float32)
            return self.drafter.choose(self.state, tree, process(logits, s.temperature, s.top_k, s.top_p, s.min_p))
        return self.steps.argmax(self.scores(features, tree.depth))

    def scores(self, features: Tensor, depth: Tensor) -> Tensor:
        """[T, V] fp32: the best one is the next token. features [T, C] of tokens `depth` [T] places after the root."""
        logits, s = linear(features, self.model.lm_head.weight, dtype=torch.float32), self.state.sampling
        if s.temperature:
            logits = perturb(logits, self.state.noise[depth], s.temperature, s.top_k, s.top_p, s.min_p)
        return logits

    def draw_noise(self) -> None:
        """The noise that the next tokens are sampled with: one row for each place in the text."""
        self.state.noise, hot = None, self.state.sampling.temperature
        if hot:
            places = self.state.length + self.nodes[:self.deepest + 1]
            self.state.noise = hot * gumbel_noise(self.state.seed, places, self.model.cfg.vocab_size)

    @torch.inference_mode()
    def cycle(self) -> None:
        """Draft, verify, accept, commit. Once `state.done`, a cycle changes nothing that counts."""
        self.draw_noise()
        base, tree = self.state.length - 1, self.drafter.propose(self.state)
        self.commit(base, tree, *self.verify(base, tree))

    def verify(self, base: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """One forward over all nodes, the root in slot `base` (0-d). Returns their features [T, C] and the target's
        choice after each, [T]."""
        slots = base + self.nodes[:len(tree.tokens)]  # siblings share a place in the text, never a slot
        mask = tree_mask(base, tree.ancestors[:, None], self.state.width)
        tokens = tree.tokens ^ (tree.tokens >> 63) if self.drafter.blanks else tree.tokens  # ~t to t
        features = self.model(tokens[None], base + tree.depth, slots, mask)[0]
        next_tokens = self.choose(features, tree)
        self.drafter.learn(self.state, tree, next_tokens)
        return features, next_tokens

    def commit(self, base: Tensor, tree: Tree, features: Tensor, next_tokens: Tensor) -> None:
        """Accept, and move what was accepted to the front of cache and features."""
        depth = self.drafter.max_depth
        path = self.accept(tree, next_tokens, depth)
        if depth:
            self.steps.compact(self.model.kv, base, path, features, self.state.features)

    def accept(self, tree: Tree, next_tokens: Tensor, max_depth: int) -> Tensor:
        return self.steps.accept_commit(tree, next_tokens, self.state, self.stop_ids, self.limit, max_depth,
                                        self.report[:max_depth + 3])

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling = Sampling(), reuse: bool = False
                 ) -> Iterator[list[int]]:
        """Yield the new token ids, cycle by cycle: first the one that prefill chose, then what each cycle
        committed. Ends after a stop id (yielded too), max_new_tokens, or a full context.

        reuse: of the prompt, process only what the last text did not begin with too. Without it a text never depends
        on what came before it: in half precision, what decoding left in the caches is rounded differently."""
        self.check(ids)
        start = self.reusable(ids) if reuse else 0
        self.forget(ids[:start])
        self.state.sampling = sampling
        cycle = self.captured(self.cycle, "cycle", replace(sampling, seed=0))  # to capture it runs the last text on
        self.prefill(ids, max_new_tokens, sampling, start)
        self.send(0)
        length, mark = len(ids), self.mark
        for turn in itertools.count():
            if self.cuda:  # running ahead is harmless: after the end a cycle changes nothing
                cycle()
                self.send(turn + 1)
            count, done, *tokens = self.receive(turn)
            self.text += tokens[:count]
            yield tokens[:count]
            if done:
                return
            if not self.holds(mark):
                raise RuntimeError("a newer generate() ended this one: a model decodes one sequence at a time")
            if not self.cuda:
                length += count
                self.state.width = min(-(-(length + SPARE) // 128) * 128, self.slots)
                cycle()
                self.send(turn + 1)

    def send(self, turn: int) -> None:
        """Copy the last cycle's report to the host, as soon as the device gets there."""
        self.inbox[turn % 2].copy_(self.report, non_blocking=True)
        if self.cuda:
            self.arrived[turn % 2].record()

    def receive(self, turn: int) -> list[int]:
        if self.cuda:
            self.arrived[turn % 2].synchronize()
        return self.inbox[turn % 2].tolist()

    @torch.inference_mode()
    def top2_gap(self, ids: list[int]) -> float:
        """How far apart the scores of the target's two best tokens after `ids` are, greedy or sampled as the last text
        was: near 0, rounding decides between them."""
        self.state.tokens[:len(ids)].copy_(torch.tensor(ids))
        first, features = self.chunks(ids)
        self.state.length.fill_(len(ids))
        self.draw_noise()
        best, second = self.scores(features[len(ids) - 1 - first][None], self.nodes[:1]).topk(2).values[0].tolist()
        return best - second


class Run(NamedTuple):
    """One generation. The first token, which prefill chose, counts in `tokens` alone."""
    tokens: list[int]  # up to the stop id, if there is one
    gained: list[int]  # tokens committed by each cycle
    prefill_s: float  # until the first token is there
    decode_s: float  # from then on


def run(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling(),
        show: Callable[[list[int]], bool | None] = lambda new: None) -> Run:
    """`show` gets the tokens as they come, and ends the text by saying True."""
    tokens, gained = [], []
    if engine.cuda:
        torch.cuda.synchronize()  # the cycle that ran ahead of the last text's end
    start = time.perf_counter()
    for new in engine.generate(ids, new_tokens, sampling):
        if tokens:
            gained.append(len(new))
        else:
            first = time.perf_counter()  # reading `new` back waited for the device
        tokens += new
        if show(new):
            break
    return Run(tokens, gained, first - start, time.perf_counter() - first)


def freeze(engine: Engine, ids: list[int], new_tokens: int, sampling: Sampling = Sampling()) -> int:
    """Continue the prompt by some `new_tokens`, then call it done: from here on a cycle does all its work and commits
    nothing. (It moves features all the same: drafts become bad ones, which cost as much.) Returns the text's length."""
    for new in engine.generate(ids, len(engine.state.tokens), sampling):
        new_tokens -= len(new)
        if new_tokens <= 0:
            break
    engine.state.done.fill_(True)
    return int(engine.state.length)
