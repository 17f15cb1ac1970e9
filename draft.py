"""What a drafter is, the EAGLE draft head, and EAGLE-2's dynamic tree.

Once a cycle a drafter proposes a tree of continuations. The engine verifies it, and verification alone decides the
text: a drafter can be slow or wrong, but it can never change what is written.

The EAGLE head (arXiv 2401.15077) guesses the target's next *feature*, its hidden state after the final norm, from the
present feature and the token that followed it: fc([embedding(t_{i+1}); f_i]), then one decoder layer without an input
norm. The target's own lm_head turns the guess into tokens. Row i of the head pairs feature i with token i + 1 and has
RoPE position i, the feature's, not the token's. An error of one there costs acceptance, never correctness.

EAGLE-2 (arXiv 2406.16858) grows its tree where the head is confident. EAGLE-3's heads (drafters/eagle3.py) draft the
same trees. The other ways to draft are in drafters/."""
from types import ModuleType

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops.tree
import tree
from formats.config import Config
from model import Layer, Llama, rope_table
from ops.attention import TreeMask, causal_mask, tree_mask
from ops.embed_rope import embed
from ops.linear import linear
from quant.draft_rows import DraftRows
from quant.linear import in_kernel_order, quantize_linears, rows_of, stack
from tree import MAX_NODES, Candidates, Level, State, Tree, root_token, start_tree


def tree_ops(device: torch.device) -> ModuleType:
    """tree.py's functions, or on a GPU the kernels of ops/tree.py, which have the same names."""
    return ops.tree if device.type == "cuda" else tree


# ----- What a drafter is -------------------------------------------------------------------------------------------


class Drafter:
    """To write one: set `num_nodes` and `max_depth`, implement `propose`, and override what else it needs.

    On a GPU a whole cycle is one CUDA graph. So `propose` and `learn` work on tensors of static shape, change tensors
    in place, and never read a value on the host."""
    num_nodes = 1  # nodes of each tree, the root included; at most tree.MAX_NODES
    max_depth = 0  # depth of the deepest node that may be accepted
    noise_depth: int | None = None  # how deep noise is needed, for any node or draft, where that is beyond max_depth
    has_blocked_nodes = False  # True if some nodes must never be accepted; such a node of token t stores ~t, below 0
    taps: tuple[int, ...] = ()  # it drafts from what enters these layers (Llama.forward_with_taps), not from features
    rejection_sampling = False  # True if the drafter accepts by `choose` instead of by position-keyed noise

    def allocate(self, slots: int) -> None:
        """Make room for `slots` cache slots. Engines may share a drafter: keep what is large enough."""

    def caches(self) -> tuple[Tensor, ...]:
        """Tensors that `allocate` may replace, or that several drafters share. When one is replaced, the CUDA graphs
        captured with the old one are thrown away. When another text was written to one, the old text cannot be
        continued."""
        return ()

    def reset(self, state: State) -> None:
        """A new text begins: state.tokens up to state.length are the prompt, which goes through `prefill` next."""

    def prefill(self, state: State, hidden: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        """Process a chunk of the prompt: features [T, C], or with `taps` the taps [T, k * C], of the tokens in `slots`
        [T] of state.tokens, which see each other as `mask` says. Rows past the prompt's end hold arbitrary tokens."""

    def propose(self, state: State) -> Tree:
        """The tree to verify. Node 0 is the root, the newest committed token."""
        raise NotImplementedError

    def learn(self, state: State, tree: Tree, next_tokens: Tensor) -> None:
        """Called after verification and before the commit. next_tokens [T] int64 are the target's choices after every
        node, accepted or not."""

    def choose(self, state: State, tree: Tree, logits: Tensor) -> Tensor:
        """With `rejection_sampling` and a temperature: the choice after each node, [T] int64. logits [T, V] fp32 are
        of the distribution to sample from (sampling.process)."""
        raise NotImplementedError

    def scores(self) -> Candidates | None:
        """All nodes considered for the last tree, with their log-probabilities, if the drafter has them."""
        return None


class Vanilla(Drafter):
    """Plain decoding: a tree of the root alone."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        self.tree = Tree(zero, zero, zero, zero[:, None] + 1)

    def propose(self, state: State) -> Tree:
        return self.tree._replace(tokens=root_token(state))


# ----- The EAGLE head ----------------------------------------------------------------------------------------------


class EagleHead(nn.Module):
    """fc and one decoder layer, with a KV cache of its own. Sizes come from the head's own config."""
    folder = "eagle"  # where it lies in the folder of a checkpoint

    def __init__(self, cfg: Config, *, fc_bias: bool = False, qkv_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=fc_bias)
        self.of_embedding: nn.Parameter | None = None  # [C, C], once quantised: fc's columns for the embedding
        self.layer = Layer(cfg, qkv_bias=qkv_bias, norm_input=False)
        self.vocab: Tensor | None = None  # [draft tokens] int64, ascending: those to draft, beside the prompt's own
        self.kv: Tensor | None = None  # [2, 1, K, S, D]
        self.rope: Tensor | None = None  # [2, S, D]

    def allocate_cache(self, slots: int) -> None:
        """The size is the engine's, not that of the head's config: published heads say 2048."""
        if self.kv is not None and self.kv.shape[3] >= slots:
            return  # engines may share a head, as they share a model
        cfg, weight = self.cfg, self.layer.mlp_norm.weight
        kv = weight.new_zeros(2, 1, cfg.num_kv_heads, slots, cfg.head_dim)
        self.rope = rope_table(cfg, slots, weight.device).to(weight.dtype)
        self.kv = kv  # last, as in Llama.allocate_cache

    def forward(self, x: Tensor, rope: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | TreeMask | None = None) -> Tensor:
        """Predicted features [B, T, C]. x [B, T, C] is fc's output, rope [2, T, D] the angles of each row's position;
        cache_pos and mask as in Llama.forward."""
        return self.layer(x, rope, None if cache_pos is None else self.kv, cache_pos, mask)

    def bind(self, target: Llama) -> "BoundHead":
        return BoundHead(self, target)

    def quantize(self, mode: str, group: int = 128, device: torch.device | str | None = None) -> None:
        """Quantise all linears except fc's columns for the embedding, which are needed once, to make a table. int8
        means int8dyn here: with 8-bit activations drafts are as good and faster (docs/quantization.md)."""
        mode = "int8dyn" if mode == "int8" else mode
        for_embedding, for_feature = self.fc.weight.detach().chunk(2, dim=1)
        self.of_embedding = nn.Parameter(for_embedding.contiguous(), False)  # not a view of all of fc
        self.fc.weight = nn.Parameter(for_feature, False)
        quantize_linears(self, mode, group, device)


# ----- Drafting with it --------------------------------------------------------------------------------------------


class BoundHead:
    """An EAGLE-1/2 head with the target that it drafts for. `Eagle` calls a head of any kind by these three methods:

    make_inputs   target's hidden states -> the head's inputs
    predict       tokens, and the input from the hidden state before each -> predicted features
    read_logits   predicted features -> logits, and the input of the next level

    fc([e; f]) = fc_e e + fc_f f. The table fc_of_token holds fc_e e + bias of every token. fc_f f is the head's input:
    it is computed once for each feature, not for each child; with a draft vocabulary the same matrix product gives the
    logits."""
    taps = ()

    def __init__(self, head: EagleHead, target: Llama) -> None:
        self.head = head
        self.draft_rows = DraftRows(target.lm_head.weight, head.vocab, head.of_embedding is not None)
        self.ids, self.lm_head = self.draft_rows.ids, self.draft_rows.weights[0]
        with torch.no_grad():
            if head.of_embedding is None:
                for_embedding, for_feature = head.fc.weight.chunk(2, dim=1)
                self.fc = for_feature.contiguous()
            else:
                for_embedding, self.fc = head.of_embedding, head.fc.weight
            self.fc_of_token = F.linear(target.embed.weight, for_embedding, head.fc.bias)  # [V, C]
            # With a draft vocabulary the lm_head's rows are a copy, so fc's rows can be stacked below them.
            self.lm_head_and_fc = None if self.ids is None else in_kernel_order(stack(self.lm_head, self.fc))
        if self.lm_head_and_fc is not None:
            count = len(self.ids)
            self.lm_head = rows_of(self.lm_head_and_fc, slice(count))
            self.fc = rows_of(self.lm_head_and_fc, slice(count, None))
            self.draft_rows.weights = [self.lm_head, self.lm_head_and_fc]

    def weights(self) -> tuple[tuple, tuple, tuple]:
        """For benchmarks/cycle.py: weights read by `make_inputs`, by each level, and by each level but the last too."""
        return (self.fc,), (self.head.layer, self.lm_head), (self.fc,)

    def make_inputs(self, hidden: Tensor) -> Tensor:
        """fc's share of the target's features [T, C]: [T, C]."""
        return linear(hidden, self.fc)

    def predict(self, tokens: Tensor, inputs: Tensor, parent_rows: Tensor | None, rope_pos: Tensor, cache_pos: Tensor,
                mask: Tensor | TreeMask) -> Tensor:
        """The features [T, C] predicted after tokens [T]. Row parent_rows[i] of `inputs` [any, C] (without parent_rows:
        row i) is the input from the feature before token i."""
        x, rope = embed(self.fc_of_token, tokens, self.head.rope, rope_pos, inputs, parent_rows)
        return self.head(x[None], rope, cache_pos, mask)[0]

    def read_logits(self, features: Tensor, last: bool) -> tuple[Tensor, Tensor | None]:
        """Logits [N, Vd] of the next tokens, at least fp32 (Vd: draft vocabulary; without one, all V), and fc's product
        with the features [N, C], the input of the next level (None if `last`). features [N, C]."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        if last:
            return linear(features, self.lm_head, dtype=dtype), None
        if self.lm_head_and_fc is None:
            return linear(features, self.lm_head, dtype=dtype), linear(features, self.fc, dtype=dtype)
        return linear(features, self.lm_head_and_fc, dtype=dtype).split((len(self.ids), features.shape[1]), -1)


class Eagle(Drafter):
    """What EAGLE-1's and EAGLE-2's trees share: the head's prefill, its catch-up on committed tokens, and the noise."""

    def __init__(self, head: EagleHead, target: Llama, max_depth: int) -> None:
        self.head, self.max_depth = head, max_depth
        self.bound = head.bind(target)
        self.ids, self.taps = self.bound.ids, self.bound.taps
        self.tree_ops = tree_ops(target.embed.weight.device)
        self.scratch: Tensor | None = None  # [2, fed nodes]: RoPE positions and slots, relative to the text's length

    def allocate(self, slots: int) -> None:
        self.head.allocate_cache(slots)

    def caches(self) -> tuple[Tensor, ...]:
        return (self.head.kv,)

    def reset(self, state: State) -> None:
        self.bound.draft_rows.add_prompt(state.tokens, state.length)

    def prefill(self, state: State, hidden: Tensor, slots: Tensor, mask: Tensor | TreeMask) -> None:
        self.bound.predict(state.tokens[slots + 1], self.bound.make_inputs(hidden), None, slots, slots, mask)

    @staticmethod
    def noise(state: State, depth: int) -> Tensor | None:
        """The noise [V] that the target will choose with below nodes of this depth. It is known in advance: added to
        the head's logits, it makes the head guess what will be sampled, not what might be (docs/experiments.md)."""
        return None if state.noise is None else state.noise[depth]

    def extend(self, state: State) -> tuple[Tensor, Tensor]:
        """Run the head over the tokens just committed, with the target's true hidden states. This replaces the drafts'
        entries in its cache. Always max_depth + 1 rows: spare ones are written to slots that are rewritten before use.

        Returns the feature [1, C] predicted after the root, and the absolute positions and slots of `scratch`."""
        tokens, slots, last_row, scratch = self.tree_ops.catch_up(state, self.max_depth + 1, self.scratch)
        mask = causal_mask(slots[0], len(slots), state.width)
        predicted = self.bound.predict(tokens, self.bound.make_inputs(state.hidden), None, slots, slots, mask)
        return predicted.index_select(0, last_row), scratch


class Eagle2(Eagle):
    """EAGLE-2's dynamic tree of `draft_tokens` nodes, the root included, and `draft_depth` levels below the root.

    Each of the `topk` nodes of a level gets its `topk` best continuations; the best `topk` of all of them are fed next.
    With `retrieval` (drafters/lookup.py) a chain found in the text competes with the drafted nodes, node by node."""

    def __init__(self, head: EagleHead, target: Llama, draft_tokens: int = 60, draft_depth: int = 6,
                 topk: int = 10, retrieval=None) -> None:
        if not (2 <= draft_tokens <= MAX_NODES and 1 <= draft_depth <= 10 and 1 <= topk <= 10):
            raise ValueError(f"a tree takes 2-{MAX_NODES} --draft_tokens, 1-10 --draft_depth and 1-10 --draft_topk")
        chain = retrieval.length if retrieval else 0
        super().__init__(head, target, max(draft_depth, chain))
        self.topk, self.levels, self.retrieval = topk, draft_depth, retrieval
        self.num_nodes = min(draft_tokens, 1 + topk + (draft_depth - 1) * topk * topk)  # no more than there are drafted
        fed = torch.arange((draft_depth - 1) * topk, device=target.embed.weight.device)
        self.scratch = torch.stack((fed // topk, fed)) - 1  # siblings share a position, never a slot
        self.root_level, self.candidates = start_tree(topk, draft_depth, fed.device, chain and chain + 1)

    def propose(self, state: State) -> Tree:
        scratch, inputs, level = self.begin(state)
        for depth in range(1, self.levels):
            inputs, level = self.expand(state, scratch, inputs, level, depth)
        return self.rerank(state)

    def begin(self, state: State) -> tuple[Tensor, Tensor | None, Level]:
        """Catch up with what was committed and draft the first level. Returns what `expand` needs: the positions and
        slots of all levels, the head's input after the root, and the level."""
        predicted, scratch = self.extend(state)
        logits, inputs = self.bound.read_logits(predicted, self.levels == 1)
        return scratch, inputs, self.grow(state, logits, self.root_level, 0)

    def expand(self, state: State, scratch: Tensor, inputs: Tensor, level: Level, depth: int
               ) -> tuple[Tensor | None, Level]:
        """Run the head over the nodes of `level`, at this depth, and draft the next level. inputs [any, C]: the head's
        inputs from the level before. Returns those from this level [k, C] (None at the last), and the next level."""
        positions, slots = scratch[:, (depth - 1) * self.topk:depth * self.topk]
        mask = tree_mask(scratch[0, 0], level.visible, state.width)
        predicted = self.bound.predict(level.tokens, inputs, level.parent_rows, positions, slots, mask)
        logits, inputs = self.bound.read_logits(predicted, depth == self.levels - 1)
        return inputs, self.grow(state, logits, level, depth)

    def grow(self, state: State, logits: Tensor, level: Level, depth: int) -> Level:
        return self.tree_ops.grow(logits, level, self.candidates, depth, self.topk, self.ids, self.noise(state, depth))

    def rerank(self, state: State) -> Tree:
        if self.retrieval:
            chain = self.retrieval.length
            self.retrieval.write(state, self.candidates.tokens[-chain - 1:], self.candidates.scores[-chain:])
        return self.tree_ops.rerank(state, self.candidates, self.num_nodes - 1, self.max_depth)

    def scores(self) -> Candidates:
        return self.candidates
