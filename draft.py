"""The EAGLE draft head and the two ways of growing a tree with it.

The head (arXiv 2401.15077) guesses the target's next *feature*, its last hidden state after the final norm,
from the present one and the token that followed it: fc([embedding(t_{i+1}); f_i]), then one decoder layer
without an input norm. The target's own lm_head turns the guess into tokens. Entry i of the head pairs
feature i with token i + 1 and takes RoPE position i, the feature's place, not the token's: off by one here
costs no correctness, only acceptance, which is why acceptance has tests of its own.

  Eagle2   grows the tree where the head is confident (arXiv 2406.16858)
  Eagle1   fills a fixed tree

What a drafter is: drafter.py.
"""
from pathlib import Path
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops.tree
import tree
from formats.config import Config
from formats.eagle import VOCAB, native_names, read_vocab
from formats.weights import fill, read_tensors
from model import Layer, Llama, rope_table
from ops.attention import TreeMask, causal_mask, tree_mask
from ops.embed_rope import embed
from ops.linear import linear
from ops.quantized import Quantized, dequantize
from quant.linear import quantize_linears, quantize_weight, rows_of, stack, stored_mode
from tree import MAX_NODES, Level, State, Tree, root


def tree_ops(device: torch.device) -> ModuleType:
    """tree.py's functions, or on a GPU the kernels of ops/tree.py, under the same names."""
    return ops.tree if device.type == "cuda" else tree


class Drafter:
    """To make one: set `num_nodes` and `max_depth`, write `propose`, and of the rest whatever it needs."""
    num_nodes = 1  # of each tree, the root included; at most tree.MAX_NODES
    max_depth = 0  # of the nodes that may be accepted
    deepest: int | None = None  # of all nodes, where some lie deeper than that
    blanks = False  # whether there are nodes that must never be accepted: one of token t holds ~t, which is below 0
    rejection = False  # whether `choose` takes the place of sampling with noise that belongs to the place in the text

    def allocate(self, slots: int) -> None:
        """Make room for a context of so many slots. Engines may share a drafter: keep what is large enough."""

    def caches(self) -> tuple[Tensor, ...]:
        """What `allocate` may replace: graphs that were captured with others are thrown away."""
        return ()

    def reset(self, state: State) -> None:
        """A new text: state.tokens up to state.length are the prompt, which goes through `prefill` next."""

    def prefill(self, state: State, features: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        """A chunk of the prompt: features [T, C] of the tokens in `slots` [T] of state.tokens, which see each other as
        `mask` says. What lies past the prompt's end is anything."""

    def propose(self, state: State) -> Tree:
        """The tree to verify. Node 0 is the root, the newest committed token."""
        raise NotImplementedError

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        """After verification, before anything is committed: next_tokens [T] are the target's choices after each node,
        whether it will be accepted or not."""

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        """With `rejection`, when sampling: the choice after each node, [T] int64, of logits [T, V] fp32 of the
        distribution to sample from."""
        raise NotImplementedError


class Vanilla(Drafter):
    """No draft: the root alone."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.shape = Tree(zero, zero, zero, zero + 1)

    def propose(self, state: State) -> Tree:
        return self.shape._replace(tokens=root(state))


class EagleHead(nn.Module):
    """fc and one decoder layer, with its own KV cache. Shapes come from the head's own config."""

    def __init__(self, cfg: Config, *, fc_bias: bool = False, qkv_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=fc_bias)
        self.of_embedding = None  # once quantised: the columns of fc that read embeddings, [C, C]
        self.layer = Layer(cfg, qkv_bias=qkv_bias, norm_input=False)
        self.kv = self.rope = self.vocab = None

    def allocate_cache(self, slots: int) -> None:
        """Sized by the engine's context, never by the head's config: published heads say 2048."""
        cfg, like = self.cfg, self.layer.mlp_norm.weight
        if self.kv is not None and self.kv.shape[3] >= slots:
            return  # engines may share a head, as they share a model
        kv = like.new_zeros(2, 1, cfg.num_kv_heads, slots, cfg.head_dim)
        self.rope = rope_table(cfg, slots, like.device).to(like.dtype)
        self.kv = kv  # last, as in Llama.allocate_cache

    def forward(self, x: Tensor, rope: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | TreeMask | None = None) -> Tensor:
        """x [B, T, C], what fc made; rope [2, T, D] of each row's place; the rest as in Llama.forward. Returns
        predicted features [B, T, C]."""
        return self.layer(x, rope, None if cache_pos is None else self.kv, cache_pos, mask)

    def quantize(self, mode: str, group: int = 128, device: torch.device | str | None = None) -> None:
        """All but what reads embeddings, which becomes a table and then is no longer needed. int8 is int8dyn: with
        8 bits of x, drafts are as good (BENCHMARKS.md) and faster."""
        mode = "int8dyn" if mode == "int8" else mode
        of_embedding, of_feature = self.fc.weight.detach().chunk(2, dim=1)
        self.of_embedding, self.fc.weight = (nn.Parameter(t, False) for t in (of_embedding, of_feature))
        quantize_linears(self, mode, group, device)


def load_head(folder: Path | str, target: Llama, vocab: int | None = None, quantize: str | None = None,
              group: int = 128) -> EagleHead:
    """An EAGLE-1/2 head as published: config.json and model.safetensors or pytorch_model.bin. draft_vocab.json may
    lie beside them, which train.py makes: the tokens worth drafting. `vocab`: only so many of these; 0: any token.
    Or one file of such a folder, such as quantize.py writes. quantize: to this mode.

    The file decides whether there are biases (configs have been wrong); its copy of the embedding is ignored.
    Raises FileNotFoundError, or ValueError where the head is damaged, of another kind, or of another model.
    """
    folder, weight, path = Path(folder), target.embed.weight, None
    if folder.is_file():
        folder, path = folder.parent, folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no draft head there; fetch one with `convert_hf_checkpoint.py ... "
                                "--eagle ID`, train one with train.py, or name its folder with --draft")
    cfg = Config.load(folder, model_type="llama")
    path = path or next((p for p in (folder / "model.safetensors", folder / "pytorch_model.bin") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
    published, metadata = read_tensors(path)
    mode, stored = stored_mode(path, metadata, quantize)
    if any(name.startswith("midlayer.") or name == "d2t" for name in published):
        raise ValueError(f"{path}: this is an EAGLE-3 head; only EAGLE-1/2 heads are implemented")
    if cfg.hidden_size != target.cfg.hidden_size or cfg.vocab_size != target.cfg.vocab_size or (
            "embed_tokens.weight" in published and published["embed_tokens.weight"].shape != weight.shape):
        raise ValueError(f"{folder}: a head for hidden size {cfg.hidden_size} and {cfg.vocab_size} tokens, but the "
                         f"target has {target.cfg.hidden_size} and {target.cfg.vocab_size}: another model's")
    tensors = native_names(published, path)
    with torch.device("meta"):
        head = EagleHead(cfg, fc_bias="fc.bias" in tensors, qkv_bias="layer.wqkv.bias" in tensors)
    if mode:
        head.quantize(mode, stored)
    fill(head, tensors, path, *(("cpu", None) if quantize else (weight.device, weight.dtype)))
    if quantize:
        head.quantize(quantize, group, weight.device)
        head.to(weight.device, weight.dtype)
    if vocab != 0 and (vocab or (folder / VOCAB).is_file()):
        head.vocab = read_vocab(folder / VOCAB, cfg.vocab_size, vocab).to(weight.device)
    return head


def drafting_rows(weight: Tensor | Quantized, ids: Tensor | None, quantized: bool) -> Tensor | Quantized:
    """The lm_head's rows of these ids (None: all); int8 for a quantised head, though the target's may not be. Against
    8 bits of x: a draft may be wrong, and nothing is easier to be right about than the best ten."""
    if ids is not None:
        weight = rows_of(weight, ids)
    if quantized and (ids is not None or not isinstance(weight, Quantized)):  # a copy in any case: rotated, as fc is
        exact = dequantize(weight, torch.float32) if isinstance(weight, Quantized) else weight.detach()
        weight = quantize_weight(exact, "int8dyn")
    return weight._replace(planes=1) if isinstance(weight, Quantized) else weight


class Eagle(Drafter):
    """What both drafters share: the head's prefill, its catch-up on accepted tokens, and what is made of its features.

    fc of an embedding and a feature is a sum. The embedding's share is a table; the feature's share is computed where
    its logits are, once for all that may follow it, and with a draft vocabulary by the same product."""

    def __init__(self, head: EagleHead, target: Llama, max_depth: int) -> None:
        self.head, self.ids, self.max_depth = head, head.vocab, max_depth
        self.steps = tree_ops(target.embed.weight.device)
        self.where: Tensor | None = None  # [2, fed nodes] int64: places and scratch slots, from the end of the text on
        self.lm_head, self.both = drafting_rows(target.lm_head.weight, self.ids, head.of_embedding is not None), None
        with torch.no_grad():
            if head.of_embedding is None:
                of_embedding, of_feature = head.fc.weight.chunk(2, dim=1)
                of_feature = of_feature.contiguous()
            else:
                of_embedding, of_feature = head.of_embedding, head.fc.weight
            self.fc, self.embedded = of_feature, F.linear(target.embed.weight, of_embedding, head.fc.bias)
            if self.ids is not None:  # the lm_head's rows are a copy already, and fc's may lie below them
                self.both = stack(self.lm_head, self.fc)
        if self.both is not None:
            count = len(self.ids)
            self.lm_head, self.fc = (rows_of(self.both, rows) for rows in (slice(count), slice(count, None)))

    def allocate(self, slots: int) -> None:
        self.head.allocate_cache(slots)

    def caches(self) -> tuple[Tensor, ...]:
        return self.head.kv,

    def prefill(self, state: State, features: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.rows(state.tokens[slots + 1], linear(features, self.fc), None, slots, slots, mask)

    def rows(self, tokens: Tensor, onward: Tensor, above: Tensor | None, rope_pos: Tensor, cache_pos: Tensor,
             mask: Tensor | TreeMask) -> Tensor:
        """The features [T, C] that follow tokens [T], where row above[i] (None: i) of `onward` is what fc makes of the
        feature before token i."""
        x, rope = embed(self.embedded, tokens, self.head.rope, rope_pos, onward, above)
        return self.head(x[None], rope, cache_pos, mask)[0]

    def read(self, hidden: Tensor, last: bool) -> tuple[Tensor, Tensor | None]:
        """Of features [N, C] that follow the nodes of a level: the logits [N, V] of the tokens below them and, unless
        that level is the last, what fc makes of them, [N, C]; at least in fp32."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if last:
            return linear(hidden, self.lm_head, dtype=dtype), None
        if self.both is None:
            return linear(hidden, self.lm_head, dtype=dtype), linear(hidden, self.fc, dtype=dtype)
        return linear(hidden, self.both, dtype=dtype).split((len(self.ids), hidden.shape[1]), -1)

    @staticmethod
    def noise(state: State, depth: int) -> Tensor | None:
        """What the target's choices below nodes of this depth will be made with, [V]. It is known: with the same noise
        the head guesses what will be sampled, not what may be (BENCHMARKS.md)."""
        return None if state.noise is None else state.noise[depth]

    def extend(self, state: State) -> tuple[Tensor, Tensor]:
        """Re-run the head over the tokens just committed, now with the target's true features, replacing what
        drafting left there. Always max_depth + 1 rows; the spare ones lie past every slot that is read.
        Returns the feature [1, C] predicted for the root, and where the nodes of this tree go."""
        tokens, slots, last, where = self.steps.catch_up(state, self.max_depth + 1, self.where)
        mask = causal_mask(slots[0], len(slots), state.width)
        hidden = self.rows(tokens, linear(state.features, self.fc), None, slots, slots, mask)
        return hidden.index_select(0, last), where


class Eagle2(Eagle):
    """EAGLE-2's dynamic tree. `draft_tokens` counts the root; `draft_depth` levels of drafted tokens; each of
    the `topk` nodes of a level is given its `topk` best continuations, of all of which the best `topk` go on.
    With `retrieval`, a chain from the text itself competes with what the head drafts, node by node."""

    def __init__(self, head: EagleHead, target: Llama, draft_tokens: int = 60, draft_depth: int = 6,
                 topk: int = 10, retrieval: Drafter | None = None) -> None:
        chain = retrieval.length if retrieval else 0
        super().__init__(head, target, max(draft_depth, chain))
        if not (2 <= draft_tokens <= MAX_NODES and 1 <= draft_depth <= 8 and 1 <= topk <= 10):
            raise ValueError(f"a tree takes 2-{MAX_NODES} --draft_tokens, 1-8 --draft_depth and 1-10 --draft_topk")
        self.topk, self.levels, self.retrieval = topk, draft_depth, retrieval
        self.num_nodes = min(draft_tokens, 1 + topk + (draft_depth - 1) * topk * topk)  # no more than candidates
        scratch = torch.arange((draft_depth - 1) * topk, device=self.embedded.device)  # slots for nodes fed
        self.where = torch.stack((scratch // topk, scratch)) - 1  # siblings share a place, never a slot
        self.start = tree.start(topk, draft_depth, scratch.device, chain and chain + 1)

    def propose(self, state: State) -> Tree:
        where, onward, level = self.begin(state)
        for depth in range(1, self.levels):
            onward, level = self.expand(state, where, onward, level, depth)
        return self.rerank(state)

    def begin(self, state: State) -> tuple[Tensor, Tensor | None, Level]:
        """Catch up with what was accepted, and choose the first level. Returns where this tree is drafted, and what
        the first `expand` wants."""
        (hidden, where), (level, candidates) = self.extend(state), self.start
        logits, onward = self.read(hidden, self.levels == 1)
        level = self.steps.grow(logits, level, candidates, 0, self.topk, self.ids, self.noise(state, 0))
        return where, onward, level

    def expand(self, state: State, where: Tensor, onward: Tensor, level: Level, depth: int
               ) -> tuple[Tensor | None, Level]:
        """Feed the nodes of `level`, `depth` below the root; onward [any, C] is what fc made of the rows fed before,
        where [2, fed nodes] the places and scratch slots of all levels, from the root's on. Returns what it makes of
        these nodes, [k, C], and the next level."""
        places, slots = where[:, (depth - 1) * self.topk:depth * self.topk]
        hidden = self.rows(level.tokens, onward, level.rows, places, slots,
                           tree_mask(where[0, 0], level.bits, state.width))
        logits, onward = self.read(hidden, depth == self.levels - 1)
        return onward, self.steps.grow(logits, level, self.start[1], depth, self.topk, self.ids,
                                       self.noise(state, depth))

    def rerank(self, state: State) -> Tree:
        if self.retrieval:
            (tokens, scores, _), chain = self.start[1], self.retrieval.length
            self.retrieval.write(state, tokens[-chain - 1:], scores[-chain:])
        return self.steps.rerank(state, self.start[1], self.num_nodes - 1, self.max_depth)
