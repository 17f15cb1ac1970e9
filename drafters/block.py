"""Block drafters: DFlash, DSpark and JetSpec write all levels of a tree in one forward (formats/block.py reads them).

    python generate.py --checkpoint checkpoints/Qwen/Qwen3-8B --block --prompt "Write a queue."

EAGLE's heads run once for each level. A block drafter runs once a cycle, over b rows: the newest committed token (the
*anchor*) and b - 1 mask tokens. Row j guesses the token j + 1 after the anchor, or in the layout called fill-in the
token j after it, where row 0 is not read. The rows see the text through *context* entries: keys and values made of the
target's taps, which are final once they are written.

    t      = norm(fc([tap_1; ...; tap_k]))        for each committed token but the anchor
    k, v   = rows of each layer's own projections of t, without the input norm; k is normed and rotated
    x      = embedding(anchor), embedding(mask), embedding(mask), ...
    x      = layer(x)                             five or so Qwen3 layers; a row sees the context, and rows of the block
    logits = lm_head(norm(x))

All branches of the tree share these logits, so the best tree is found exactly (tree.grid). A Markov head (DSpark) adds
a term for the token before, and then the tree is grown level by level as EAGLE-2's is:

    logits_d = logits of row d + W2 W1[token before]

Shapes: T tokens, b rows of the block, D depths, H the head's width, C the target's, k taps, V tokens, Vd draft tokens,
L layers, K key/value heads, S cache slots.
"""
from collections.abc import Collection

import torch
import torch.nn as nn
from torch import Tensor

from draft import Drafter, tree_ops
from drafters.tapped import TappedHead
from formats.block import BlockConfig
from formats.weights import empty_embedding
from model import Layer, Llama, RMSNorm
from ops.attention import TreeMask, tree_mask
from ops.context import store_context
from ops.embed_rope import embed
from ops.linear import linear, rms_norm
from ops.markov import grow_markov
from ops.quantized import Quantized
from quant.draft_rows import DraftRows
from quant.linear import rows_of, stack, zero_rows
from tree import MAX_NODES, Candidates, State, Tree, empty_candidates, root_token, start_tree

MAX_LEVELS = 16  # that are drafted; each has up to 127 candidates, so tree.rerank chooses from up to 2,032
MAX_CANDIDATES = 1000  # of a tree that is grown level by level: its top-k is lowered until there are no more

# ----- The head ----------------------------------------------------------------------------------------------------


class Markov(nn.Module):
    """What DSpark adds to the logits for the token before. "vanilla": W2 W1[token]. "gated": a gate from the row's
    hidden state multiplies W1[token]. "rnn": a state of all tokens since the anchor takes the place of W1[token]."""

    def __init__(self, cfg: BlockConfig) -> None:
        super().__init__()
        size, rank = cfg.layer.hidden_size, cfg.markov_rank
        self.kind = cfg.markov
        self.w1 = empty_embedding(cfg.layer.vocab_size, rank)
        self.w2 = nn.Linear(rank, cfg.draft_vocab_size, bias=False)
        if cfg.markov == "gated":
            self.gate = nn.Linear(size + rank, rank)
        elif cfg.markov == "rnn":
            self.joint = nn.Linear(2 * rank + size, 3 * rank)

    def forward(self, tokens: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Returns W2's input [m, r] and the new RNN state [m, r]. tokens [m] int64: the tokens before; h [1 or m, H]:
        hidden states of the row; `state` [m, r]: the RNN state before these tokens. Only "rnn" reads and changes it."""
        e = self.w1.weight[tokens]
        if self.kind != "vanilla":
            h = h.expand(len(e), -1)
        if self.kind == "gated":
            e = torch.sigmoid(linear(torch.cat((h, e), -1), self.gate.weight, self.gate.bias)) * e
        elif self.kind == "rnn":
            x = linear(torch.cat((state, e, h), -1), self.joint.weight, self.joint.bias)
            gate, new, out = x.chunk(3, -1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1 - gate) * torch.tanh(new)
            e = torch.tanh(out)
        return e, state


class BlockHead(TappedHead):
    """The weights of a head, and its cache. `names`: those of its tensors, which decide what parts there are."""
    folder = "block"

    def __init__(self, cfg: BlockConfig, names: Collection[str] = ()) -> None:
        super().__init__(cfg, names)
        size, eps = cfg.layer.hidden_size, cfg.layer.rms_norm_eps
        self.fc = nn.Linear(len(cfg.taps) * cfg.target_size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        bias = "layers.0.wqkv.bias" in names
        self.layers = nn.ModuleList(Layer(cfg.layer, qkv_bias=bias) for _ in range(cfg.layer.num_layers))
        self.norm = RMSNorm(size, eps)
        self.markov = Markov(cfg) if cfg.markov else None


class BoundBlock:
    """A head with the target that it drafts for: the keys' and values' projections of all layers as one matrix, and
    the rows of the lm_head that are drafted from."""

    def __init__(self, head: BlockHead, target: Llama) -> None:
        self.head = head
        layer = head.cfg.layer
        self.table = (target if head.embed is None else head).embed.weight
        lm_head = (target if head.lm_head is None else head).lm_head.weight
        self.draft_rows = DraftRows(lm_head, head.vocab, head.quantized)
        self.ids, self.lm_head = self.draft_rows.ids, self.draft_rows.weights[0]
        keys_and_values = slice(layer.num_heads * layer.head_dim, None)
        self.kv_weight, *further = (rows_of(each.wqkv.weight, keys_and_values) for each in head.layers)
        for weight in further:
            self.kv_weight = stack(self.kv_weight, weight)
        biases = [each.wqkv.bias for each in head.layers]
        self.kv_bias = None if biases[0] is None else torch.cat([bias[keys_and_values] for bias in biases])
        self.k_norms = torch.stack([each.k_norm.weight for each in head.layers])
        self.w2 = None if head.markov is None else head.markov.w2.weight
        self.w2_rows = None
        if head.markov and head.vocab is not None and self.w2.shape[0] > len(head.vocab):  # listed by draft_vocab.json
            self.w2_rows = DraftRows(self.w2, head.vocab, False)
            self.w2 = self.w2_rows.weights[0]
        elif head.markov and self.draft_rows.prompt_rows:  # it knows listed tokens alone: it adds 0 to others
            self.w2 = stack(zero_rows(self.w2, self.draft_rows.prompt_rows), self.w2)

    def draft_prompt(self, state: State) -> None:
        """Draft the prompt's tokens too."""
        self.draft_rows.add_prompt(state.tokens, state.length)
        if self.w2_rows:
            self.w2_rows.add_prompt(state.tokens, state.length)

    def weights(self) -> tuple[tuple, tuple, tuple]:
        """The weights that `add_context` reads, and that `predict` and `read_logits` do, as draft.BoundHead.weights."""
        markov = () if self.w2 is None else (self.w2,)
        return (self.head.fc, self.kv_weight), (self.head.layers, self.lm_head, *markov), ()

    def add_context(self, taps: Tensor, slots: Tensor) -> None:
        """Store the context entries of tokens in `slots` [T], of which the target's taps are [T, k * C]."""
        head = self.head
        t = linear(taps, head.fc.weight)
        rows = linear(t, self.kv_weight, self.kv_bias, (head.hidden_norm.weight, head.hidden_norm.eps))
        store_context(rows, head.rope, slots, head.kv[:, :, 0], self.k_norms, head.layers[0].k_norm.eps)

    def predict(self, tokens: Tensor, rope_pos: Tensor, cache_pos: Tensor, masks: dict[int | None, Tensor | TreeMask]
                ) -> Tensor:
        """The hidden states [rows, H] of rows of blocks, before the last norm. tokens, rope_pos, cache_pos [rows];
        masks: one for each value of cfg.windows (None: no sliding window)."""
        x, rope = embed(self.table, tokens, self.head.rope, rope_pos)
        x = x[None]
        for layer, kv, window in zip(self.head.layers, self.head.kv, self.head.cfg.windows):
            x = layer(x, rope, kv, cache_pos, masks[window])
        return x[0]

    def last_norm(self, x: Tensor) -> Tensor:
        """Hidden states [N, H] after the last norm."""
        return rms_norm(x, self.head.norm.weight, self.head.norm.eps)

    def read_logits(self, x: Tensor) -> Tensor:
        """The logits [N, Vd] of hidden states [N, H], at least fp32."""
        norm = self.head.norm
        return linear(x, self.lm_head, norm=(norm.weight, norm.eps), dtype=torch.promote_types(x.dtype, torch.float32))

    def markov_logits(self, tokens: Tensor, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What the Markov head adds to the logits below tokens [m], [m, Vd] at least fp32, and its states after them.
        """
        e, state = self.head.markov(tokens, h, state)
        return linear(e, self.w2, dtype=torch.promote_types(e.dtype, torch.float32)), state


# ----- Drafting with it --------------------------------------------------------------------------------------------


class Block(Drafter):
    """A tree of `draft_tokens` nodes, the root included, from one forward of the head. Nodes have `topk` possible
    continuations. With `retrieval` (drafters/lookup.py) a chain found in the text competes with the drafted nodes.
    """

    def __init__(self, head: BlockHead, target: Llama, draft_tokens: int = 60, topk: int = 10, retrieval=None) -> None:
        if not (2 <= draft_tokens <= MAX_NODES and 1 <= topk <= 10):
            raise ValueError(f"a tree takes 2-{MAX_NODES} --draft_tokens and 1-10 --draft_topk")
        cfg, device = head.cfg, target.embed.weight.device
        skipped = 0 if cfg.anchor_first else 1  # rows before the first that is read
        depth = min(cfg.block_size - skipped, MAX_LEVELS)
        # A head whose rows see later rows needs all of them, as it was trained.
        rows = self.rows = depth + skipped if cfg.causal else cfg.block_size
        chain = retrieval.length if retrieval else 0
        self.head, self.depth, self.retrieval, self.taps = head, depth, retrieval, cfg.taps
        self.max_depth = max(depth, chain)
        self.bound = BoundBlock(head, target)
        self.tree_ops = tree_ops(device)
        self.read_rows = slice(skipped, skipped + depth)
        self.scratch = torch.arange(rows, device=device).repeat(2, 1) - 1  # the anchor is the last token of the text
        self.mask_tokens = torch.full((rows - 1,), cfg.mask_token, device=device)
        bits = [(1 << (row + 1 if cfg.causal else rows)) - 1 for row in range(rows)]
        self.visible = torch.tensor([[word - (word >> 63 << 64)] for word in bits], device=device)  # as signed words
        while head.markov and topk + (depth - 1) * topk**2 > MAX_CANDIDATES:
            topk -= 1
        self.topk = min(topk, cfg.draft_vocab_size)
        self.num_nodes = min(draft_tokens, 1 + sum(min(self.topk**d, MAX_NODES) for d in range(1, depth + 1)))
        if head.markov:
            self.root_level, self.candidates = start_tree(self.topk, depth, device, chain and chain + 1)
            self.num_nodes = min(self.num_nodes, 1 + self.topk + (depth - 1) * self.topk**2)
        else:
            self.candidates = empty_candidates(depth * (self.num_nodes - 1), device, chain and chain + 1)

    def allocate(self, slots: int) -> None:
        self.head.allocate_cache(slots)

    def caches(self) -> tuple[Tensor, ...]:
        return (self.head.kv,)

    def reset(self, state: State) -> None:
        self.bound.draft_prompt(state)

    def prefill(self, state: State, hidden: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.bound.add_context(hidden, slots)

    def propose(self, state: State) -> Tree:
        self.draft(state)
        return self.rerank(state)

    def draft(self, state: State) -> None:
        """Catch up with what was committed, and draft all levels. Rows of `hidden` that do not count are remembered
        too, in slots that the block overwrites or cannot see."""
        _, places, _, (slots, _) = self.tree_ops.catch_up(state, self.max_depth + 1, self.scratch)
        self.bound.add_context(state.hidden, places)
        anchor = root_token(state)
        # The row at position p sees the context from position p - window + 1 on, as SpecForge trains it. speculators
        # lets all rows see back to `window` positions before the anchor: a difference of a few tokens at the edge.
        masks = {window: tree_mask(slots[0], self.visible, state.width, window) for window in self.head.cfg.windows}
        x = self.bound.predict(torch.cat((anchor, self.mask_tokens)), slots, slots, masks)[self.read_rows]
        logits = self.bound.read_logits(x)
        if self.head.markov:
            self.grow(state, anchor, x, logits)
        else:
            self.tree_ops.grid(logits, self.candidates, self.num_nodes - 1, self.topk, self.bound.ids, state.noise)

    def rerank(self, state: State) -> Tree:
        if self.retrieval:
            chain = self.retrieval.length
            self.retrieval.write(state, self.candidates.tokens[-chain - 1:], self.candidates.scores[-chain:])
        return self.tree_ops.rerank(state, self.candidates, self.num_nodes - 1, self.max_depth)

    def grow(self, state: State, anchor: Tensor, x: Tensor, logits: Tensor) -> None:
        """Grow the tree by levels: what follows a node depends on its token. x [D, H] and logits [D, Vd] are the
        rows'."""
        markov, w2 = self.head.markov, self.bound.w2
        level = self.root_level._replace(tokens=anchor)
        vanilla = markov.kind == "vanilla"
        fused = vanilla and not isinstance(w2, Quantized)
        h = x if vanilla else self.bound.last_norm(x)
        states = x.new_zeros(1, markov.w1.weight.shape[1])
        for depth in range(self.depth):
            noise = None if state.noise is None else state.noise[depth]
            below = level, self.candidates, depth, self.topk, self.bound.ids, noise
            if fused:
                level = grow_markov(logits[depth:depth + 1], markov.w1.weight, w2, *below)
            else:
                added, states = self.bound.markov_logits(level.tokens, h[depth:depth + 1], states)
                level = self.tree_ops.grow(logits[depth:depth + 1] + added, *below)
                states = states[level.parent_rows] if markov.kind == "rnn" else states

    def scores(self) -> Candidates:
        return self.candidates
