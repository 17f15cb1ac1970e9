"""The engine: a model, a drafter and one sequence, decoded cycle by cycle.

    engine = Engine(load_model("checkpoints/org/name", "cuda"), Vanilla("cuda"), max_seq_len=2048)
    for tokens in engine.generate([1, 2, 3], max_new_tokens=100): ...

One cycle, in the order of the code below:

    draft      the drafter proposes a tree of continuations of the newest token        drafter.propose
    verify     one forward of the target over all nodes of the tree                    Engine.verify
    choose     the target's next token after every node: argmax, or a sample           Engine.choose
    accept     the longest path on which every node is the target's own choice         tree.accept_commit
    commit     append these tokens and the bonus token; stop ids and the length limit  tree.accept_commit
    compact    move the path's keys and values after the text's, keep its features     tree.compact

Vanilla decoding is the same cycle with a tree of one node. Everything in a cycle has a static shape and lives on the
device: lengths, positions, masks, the stop test. So on a GPU a cycle is one CUDA graph, whatever the prompt. The host
replays cycle n + 1 before it reads what cycle n committed, so that the GPU never waits for Python."""
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from draft import Drafter, Vanilla, tree_ops
from model import Llama
from ops.attention import causal_mask, tree_mask
from ops.compiling import compile_kernels
from ops.graphs import Mailbox, capture
from ops.linear import linear
from quant.linear import is_quantized
from sampling import Sampling, gumbel_noise, perturb, process
from tree import MAX_NODES, State, Tree, chain_tree

PREFILL_CHUNK = 512  # prompt tokens of one forward
SHORT_CHUNK = 64  # on a GPU, for the end of a prompt: such a forward costs as little as a verification
SPARE = 128  # cache slots past max_seq_len, for drafts that reach beyond the last token that may be committed
LAST_WRITTEN = WeakTensorKeyDictionary()  # cache -> the sequence that was written to it last, by any engine


class Engine:
    """A model, a drafter and the state of one sequence. A new `generate` ends an older one that has not finished, on
    this engine or on another one that shares the model; stopping early is harmless. compiled=False launches every
    kernel from Python instead of replaying CUDA graphs: slow, but one can step through."""

    def __init__(self, model: Llama, drafter: Drafter, max_seq_len: int,
                 stop_ids: frozenset[int] = frozenset(), compiled: bool = True) -> None:
        self.model = model
        self.drafter = drafter
        self.max_seq_len = max_seq_len
        self.device = device = model.embed.weight.device
        self.cuda = device.type == "cuda"
        self.tree_ops = tree_ops(device)
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=device)

        # Caches, which engines may share
        self.slots = max_seq_len + SPARE
        if model.kv is None or model.kv.shape[2] != 1 or model.kv.shape[4] < self.slots:
            model.allocate_cache(max_seq_len, SPARE)
        drafter.allocate(self.slots)

        # Prefill. features [chunk, C]; hidden, the drafter's input: taps [chunk, k * C], or without taps `features`
        zero = torch.zeros((), dtype=torch.int64, device=device)
        self.first_slot = zero.clone()  # 0-d int64: the slot of the chunk's first token
        self.features = model.embed.weight.new_zeros(min(PREFILL_CHUNK, max_seq_len), model.cfg.hidden_size)
        self.hidden = self.features.repeat(1, len(drafter.taps)) if drafter.taps else self.features
        self.short_rows = min(SHORT_CHUNK, len(self.features))
        # Up to this many remaining tokens are cheaper in short chunks than in a long one, which dequantises first.
        self.short_up_to = (5 if is_quantized(model) else 2) * self.short_rows

        # The sequence on the device
        rows = drafter.max_depth + 1
        self.state = State(
            tokens=torch.zeros(self.slots + 1, dtype=torch.int64, device=device), length=zero + 2, committed=zero + 1,
            hidden=self.hidden.new_zeros(rows, self.hidden.shape[1]), done=zero == 0, width=self.slots,
            seed=zero.clone(), sampling=Sampling())
        self.limit = zero + 1  # the longest that the text may become
        self.noise_depth = drafter.noise_depth or drafter.max_depth
        self.indices = torch.arange(max(MAX_NODES, self.noise_depth + 1), device=device)  # of nodes, slots, depths

        # The host
        self.before_chunk: Callable[[], None] = lambda: None  # of a prompt; what it raises ends the prompt
        self.report = torch.zeros(rows + 2, dtype=torch.int64, device=device)  # see tree.accept_commit
        self.mailbox = Mailbox(self.report)
        self.graphs: dict[tuple, Callable[[], None]] | None = {} if self.cuda and compiled else None
        self.graph_caches: tuple[Tensor, ...] = ()  # the caches that the graphs read and write
        self.text: list[int] = []  # what the host knows to be committed
        self.sequence = object()  # marks the text of this engine, see `begin_sequence`
        self.reused = 0  # prompt tokens that were in the caches already
        self.compile_s = 0.0

    # ----- Generating ----------------------------------------------------------------------------------------------

    def generate(self, ids: list[int], max_new_tokens: int, sampling: Sampling = Sampling(), reuse: bool = False
                 ) -> Iterator[list[int]]:
        """Yield lists of new token ids: first the one chosen by prefill, then those of each cycle. Ends after a stop
        id, which is yielded too, after max_new_tokens, or at max_seq_len. Raises ValueError (see `check`) at the first
        next(), RuntimeError if another `generate` took over the caches.
        reuse: keep the cache entries of the prefix shared with the last text. Off by default: in half precision,
        entries written by decoding are rounded differently from those of prefill, so the same prompt could give
        another text."""
        self.check(ids, max_new_tokens)
        start = self.reusable(ids) if reuse else 0
        self.begin_sequence(ids[:start])
        self.state.sampling = sampling
        # Capturing executes the cycle, so it comes before prefill resets the state.
        cycle = self.captured(self.cycle, "cycle", replace(sampling, seed=0))
        self.prefill(ids, max_new_tokens, sampling, start)
        self.mailbox.send(0)
        sequence = self.sequence
        for turn in itertools.count():
            if self.cuda:  # run ahead: after the end a cycle changes nothing
                cycle()
                self.mailbox.send(turn + 1)
            count, done, *tokens = self.mailbox.receive(turn)
            self.text += tokens[:count]
            yield tokens[:count]
            if done:
                return
            if not self.owns_caches(sequence):
                raise RuntimeError("a newer generate() ended this one: a model decodes one sequence at a time")
            if not self.cuda:
                self.state.width = min(round_up(len(self.text) + SPARE, 128), self.slots)
                cycle()
                self.mailbox.send(turn + 1)

    @torch.inference_mode()
    def cycle(self) -> None:
        """Draft, verify, accept, commit. Once `state.done`, a cycle commits nothing, see tree.accept_commit."""
        self.draw_noise()
        base = self.state.length - 1  # the slot of the root
        tree = self.drafter.propose(self.state)
        hidden, next_tokens = self.verify(base, tree)
        self.commit(base, tree, hidden, next_tokens)

    def draw_noise(self) -> None:
        """Set state.noise [noise_depth + 1, V] fp32, one row for each position from `length` on; None if greedy."""
        temperature = self.state.sampling.temperature
        self.state.noise = None
        if temperature:
            positions = self.state.length + self.indices[:self.noise_depth + 1]
            self.state.noise = temperature * gumbel_noise(self.state.seed, positions, self.model.cfg.vocab_size)

    def verify(self, base: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
        """One forward over all nodes; the root goes to slot `base` (0-d int64). Returns the drafter's input, features
        [T, C] or taps [T, k * C], and the target's next token after each node, [T] int64. Calls drafter.learn."""
        slots = base + self.indices[:len(tree.tokens)]  # siblings share a position, never a slot
        mask = tree_mask(base, tree.ancestors, self.state.width, settled=True)
        tokens = tree.tokens ^ (tree.tokens >> 63) if self.drafter.has_blocked_nodes else tree.tokens  # ~t back to t
        features, hidden = self.model.forward_with_taps(tokens[None], base + tree.depth, slots, mask, self.drafter.taps)
        next_tokens = self.choose(features[0], tree)
        self.drafter.learn(self.state, tree, next_tokens)
        return hidden[0], next_tokens

    def choose(self, features: Tensor, tree: Tree) -> Tensor:
        """The target's next token after each node, [T] int64. features [T, C]."""
        s = self.state.sampling
        if s.temperature and self.drafter.rejection_sampling:
            logits = linear(features, self.model.lm_head.weight, dtype=torch.float32)
            return self.drafter.choose(self.state, tree, process(logits, s.temperature, s.top_k, s.top_p, s.min_p))
        return self.tree_ops.argmax(self.scores(features, tree.depth))

    def scores(self, features: Tensor, depth: Tensor) -> Tensor:
        """What to take the argmax of, [T, V] fp32. features [T, C] of tokens `depth` [T] positions after the root."""
        logits = linear(features, self.model.lm_head.weight, dtype=torch.float32)
        s = self.state.sampling
        if s.temperature:
            logits = perturb(logits, self.state.noise[depth], s.temperature, s.top_k, s.top_p, s.min_p)
        return logits

    def commit(self, base: Tensor, tree: Tree, hidden: Tensor, next_tokens: Tensor) -> None:
        """Accept and commit; move the path's keys and values right after the text's; copy hidden to `state.hidden`."""
        path = self.accept(tree, next_tokens, self.drafter.max_depth)
        if self.drafter.max_depth:
            self.tree_ops.compact(self.model.kv, base, path, hidden, self.state.hidden)

    def accept(self, tree: Tree, next_tokens: Tensor, max_depth: int) -> Tensor:
        return self.tree_ops.accept_commit(tree, next_tokens, self.state, self.stop_ids, self.limit, max_depth,
                                           self.report[:max_depth + 3])

    # ----- The prompt ----------------------------------------------------------------------------------------------

    def check(self, ids: list[int], max_new_tokens: int) -> None:
        """ValueError if ids are empty, too long or not in the vocabulary, or if max_new_tokens is below 1."""
        if not ids:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if len(ids) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(ids)} tokens and --max_seq_len {self.max_seq_len} leaves no room "
                             f"for more (the model was made for {self.model.cfg.max_position_embeddings})")
        if min(ids) < 0 or max(ids) >= self.model.cfg.vocab_size:
            raise ValueError(f"the prompt has ids that the model lacks: they are 0 to {self.model.cfg.vocab_size - 1}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")

    @torch.inference_mode()
    def prefill(self, ids: list[int], max_new_tokens: int, sampling: Sampling, start: int = 0) -> State:
        """Process the prompt from token `start` on and commit the first new token. ValueError where it does not fit."""
        self.check(ids, max_new_tokens)
        state, n = self.state, len(ids)
        self.reused = start
        state.sampling = sampling
        state.seed.fill_(sampling.seed)
        self.limit.fill_(min(n + max_new_tokens, self.max_seq_len))
        state.tokens[:n].copy_(torch.tensor(ids))
        state.length.fill_(n)
        self.drafter.reset(state)
        last = self.prefill_chunks(ids, start)
        self.text = list(ids)
        state.done.fill_(False)
        self.commit_first(last)
        return state

    def commit_first(self, row: int) -> None:
        """Commit the target's choice after the prompt, whose last token is in this row of `features`."""
        self.state.hidden[0] = self.hidden[row]
        self.draw_noise()
        root = Vanilla(self.device).propose(self.state)
        self.accept(root, self.choose(self.features[row][None], root), 0)

    def prefill_chunks(self, ids: list[int], start: int = 0) -> int:
        """Run model and drafter over the prompt from token `start` on. Returns the last token's row of `features`."""
        rows, n = len(self.features), len(ids)
        self.begin_sequence(ids[:start])
        if not self.cuda:
            for first in range(start, n, rows):
                self.before_chunk()
                self.first_slot.fill_(first)
                count = min(rows, round_up(n - first, 16))  # oneDNN keeps kernels of every shape that it ever saw
                self.prefill_chunk(count, min(round_up(first + count, 128), self.slots))
            return n - 1 - first
        self.first_slot.zero_()  # capturing executes the chunk, see `compile`
        chunks = {size: self.captured(partial(self.prefill_chunk, size, self.slots), "chunk", size)
                  for size in (self.short_rows, rows)}
        while start < n:  # two shapes serve every prompt
            size = self.short_rows if n - start <= self.short_up_to else rows
            first = min(start, self.slots - size)  # the last chunk begins earlier if it would pass the end of the cache
            self.before_chunk()
            self.first_slot.fill_(first)
            chunks[size]()
            start += size
        return n - 1 - first

    def prefill_chunk(self, rows: int, width: int) -> None:
        """Fill `rows` cache slots from `first_slot` on, `features` and `hidden`. Entries past the prompt's end are
        overwritten before they are read. So is the head's last entry: it needs a token that is not chosen yet."""
        slots = self.first_slot + torch.arange(rows, device=self.device)
        mask = causal_mask(self.first_slot, rows, width)
        tokens, taps = self.state.tokens[slots][None], self.drafter.taps
        features, hidden = self.model.forward_with_taps(tokens, slots, slots, mask, taps)
        self.features[:rows].copy_(features[0])
        if taps:
            self.hidden[:rows].copy_(hidden[0])
        self.drafter.prefill(self.state, hidden[0], slots, mask)

    # ----- Which sequence is in the caches -------------------------------------------------------------------------

    def caches(self) -> tuple[Tensor, ...]:
        return (self.model.kv, *self.drafter.caches())

    def begin_sequence(self, text: list[int]) -> None:
        """A new sequence begins, of which the caches hold `text` already. Engines may share caches."""
        self.text = text
        self.sequence = object()
        LAST_WRITTEN.update((cache, self.sequence) for cache in self.caches())

    def owns_caches(self, sequence: object) -> bool:
        """True if `sequence` is still this engine's, and is what all of its caches hold."""
        return sequence is self.sequence and all(LAST_WRITTEN.get(cache) is sequence for cache in self.caches())

    def reusable(self, ids: list[int]) -> int:
        """How many prompt tokens have valid cache entries: the prefix shared with the last text, less one, because a
        head's entry for token i needs token i + 1. The last max_depth + 2 tokens of that text never count: a drafter
        processes committed tokens one cycle later, and a cycle that ran ahead or was interrupted may have overwritten
        their slots."""
        if not self.owns_caches(self.sequence):
            return 0
        return max(0, min(first_difference(ids, self.text) - 1, len(self.text) - self.drafter.max_depth - 2))

    # ----- Compiling and capturing ---------------------------------------------------------------------------------

    def warm_up(self, sampling: Sampling) -> None:
        """Compile, capture and run a few cycles, so that this is not timed as decoding. On a CPU, which compiles
        nothing, the first cycle takes hardly longer than the next ones."""
        start = time.perf_counter()
        if self.cuda:
            self.compile(sampling)
            list(self.generate([0] * min(8, self.max_seq_len - 1), 8, sampling))
        self.compile_s = time.perf_counter() - start

    def compile(self, sampling: Sampling = Sampling(), rows: tuple[int, ...] = ()) -> None:
        """Compile the kernels of prefill, of a cycle, and of verifying chains of rows[i] nodes. `rows` needs greedy
        sampling, since a chain may be longer than the noise. Ends the text."""
        self.begin_sequence([])
        self.first_slot.zero_()  # elsewhere a chunk might reach past the caches
        self.state.sampling = sampling
        chunks = (partial(self.prefill_chunk, size, self.slots) for size in (self.short_rows, len(self.features)))
        trees = (partial(self.verify, self.state.length - 1, self.chain(n)) for n in rows)
        compile_kernels(self.cycle, *chunks, partial(self.commit_first, 0), *trees)

    def captured(self, function: Callable[[], None], *key: object) -> Callable[[], None]:
        """`function` as a CUDA graph, from an LRU cache by key; `function` itself on a CPU or with compiled=False."""
        if self.graphs is None:
            return function
        caches = self.caches()
        if any(a is not b for a, b in zip(caches, self.graph_caches)):  # another engine that shares them replaced one
            self.graphs.clear()
        self.graph_caches = caches
        self.graphs[key] = self.graphs.pop(key, None) or capture(function)  # the latest comes last
        if len(self.graphs) > 10:  # a prompt's two chunks and the cycle for the 8 latest samplings: a server sees many
            del self.graphs[next(iter(self.graphs))]
        return self.graphs[key]

    # ----- Measuring -----------------------------------------------------------------------------------------------

    def chain(self, rows: int) -> Tree:
        """A chain of `rows` arbitrary tokens."""
        return chain_tree(rows - 1, self.device)._replace(tokens=self.state.tokens[:rows].clone())

    def freeze(self, length: int | None = None) -> None:
        """End the text: from now on a cycle does all of its work and commits nothing. (It still moves features, so
        drafts become bad ones, which cost as much.) With `length`, the text is an arbitrary one of so many tokens."""
        self.state.done.fill_(True)
        if length is not None:
            self.begin_sequence([])
            self.limit.fill_(self.max_seq_len)
            self.state.length.fill_(length)
            self.state.width = self.slots if self.cuda else min(length + SPARE, self.slots)

    @torch.inference_mode()
    def top2_gap(self, ids: list[int], sampling: Sampling = Sampling()) -> float:
        """The gap between the two best logits (plus noise) after `ids`; near 0, rounding decides. Ends the text."""
        self.state.sampling = sampling
        self.state.seed.fill_(sampling.seed)
        self.state.tokens[:len(ids)].copy_(torch.tensor(ids))
        last = self.prefill_chunks(ids)
        self.state.length.fill_(len(ids))
        self.draw_noise()
        return self.scores(self.features[last][None], self.indices[:1]).topk(2).values[0].diff().abs().item()


def first_difference(ids: list[int], others: list[int]) -> int:
    """The index of the first token that differs; where one text begins with the other, the shorter length."""
    return next((i for i, (a, b) in enumerate(zip(ids, others)) if a != b), min(len(ids), len(others)))


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
