"""Trees of block drafters the plain way: nothing is cached, rows are lists, and the best nodes come from a heap."""
import heapq
import itertools

import torch
import torch.nn.functional as F
from plain_trees import KeyValue, Node, Plain, attend, norm, ranked, rotate
from torch import Tensor

from formats.block import BlockConfig
from model import Llama
from sampling import Sampling, gumbel_noise


class PlainBlock:
    """A block head, from its tensors as formats/block.py names them. ids [Vd]: the target's tokens, in the order of the
    lm_head's rows."""

    def __init__(self, tensors: dict[str, Tensor], cfg: BlockConfig, ids: Tensor | None, target: Llama) -> None:
        dtype = target.embed.weight.dtype
        self.w = {name: t.to(dtype) for name, t in tensors.items()}
        self.cfg = cfg
        self.embed = self.w.get("embed.weight", target.embed.weight)
        self.vocab_size = target.cfg.vocab_size
        self.ids = torch.arange(self.vocab_size) if ids is None else ids
        self.lm_head = self.w.get("lm_head.weight", target.lm_head.weight[self.ids])

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return norm(x, self.w[name + ".weight"], self.cfg.layer.rms_norm_eps)

    def qkv(self, layer: int, x: Tensor, place: int) -> tuple[Tensor, KeyValue]:
        """Normed and rotated query and key, and the value, of one row x [H]."""
        at, sizes = f"layers.{layer}.", self.cfg.layer
        rows = [n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]
        q, k, v = (y.view(-1, sizes.head_dim) for y in self.linear(at + "wqkv", x).split(rows))
        q, k = self.norm(at + "q_norm", q), self.norm(at + "k_norm", k)
        return rotate(q, place, sizes), (rotate(k, place, sizes), v)

    def add_context(self, taps: Tensor, place: int) -> list[KeyValue]:
        """A context entry: for each layer key and value of the token at this place, of its taps [k * C]."""
        t = self.norm("hidden_norm", self.linear("fc", taps))
        return [self.qkv(layer, t, place)[1] for layer in range(self.cfg.layer.num_layers)]

    def rows(self, anchor: int, place: int, context: list[list[KeyValue]]) -> list[Tensor]:
        """The rows of the block whose anchor is at `place`, after the last layer. context: of all places before it. A
        layer with a sliding window cuts it: a row sees `window` places, its own the last of them."""
        size = self.cfg.block_size
        xs = [self.embed[token] for token in [anchor] + [self.cfg.mask_token] * (size - 1)]
        for layer in range(self.cfg.layer.num_layers):
            at = f"layers.{layer}."
            parts = [self.qkv(layer, self.norm(at + "attn_norm", x), place + j) for j, x in enumerate(xs)]
            for j, (q, _) in enumerate(parts):
                of_block = [key_value for _, key_value in parts[:j + 1 if self.cfg.causal else size]]
                window = self.cfg.windows[layer]
                seen = context if window is None else context[max(0, place + j + 1 - window):]
                h = xs[j] + self.linear(at + "wo", attend(q, [entry[layer] for entry in seen] + of_block))
                gate, up = self.linear(at + "w13", self.norm(at + "mlp_norm", h)).chunk(2)
                xs[j] = h + self.linear(at + "w2", F.silu(gate) * up)
        return [self.norm("norm", x) for x in (xs if self.cfg.anchor_first else xs[1:])]

    def markov(self, token: int, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """What a Markov head adds to the logits after `token`, and the state after it (only "rnn" has one)."""
        e = self.w["markov.w1.weight"][token]
        if self.cfg.markov == "gated":
            e = torch.sigmoid(self.linear("markov.gate", torch.cat((h, e)))) * e
        elif self.cfg.markov == "rnn":
            gate, new, out = self.linear("markov.joint", torch.cat((state, e, h))).chunk(3)
            state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(new)
            e = torch.tanh(out)
        return self.w["markov.w2.weight"] @ e, state


class BlockBuilder:
    """Builds trees over a text whose taps [tokens, k * C] are known."""

    def __init__(self, head: PlainBlock, text: list[int], taps: Tensor, sampling: Sampling = Sampling()) -> None:
        self.head, self.text, self.sampling = head, text, sampling
        self.context = [head.add_context(row, place) for place, row in enumerate(taps)]

    def noise(self, place: int) -> Tensor | float:
        s = self.sampling
        if not s.temperature:
            return 0.0
        draws = gumbel_noise(torch.tensor(s.seed), torch.tensor([place]), self.head.vocab_size)
        return (s.temperature * draws[0])[self.head.ids]

    def ranking(self, logits: Tensor, place: int) -> list[tuple[int, float]]:
        """The 11 best tokens at this place with their log-probabilities."""
        [best] = ranked((logits + self.noise(place))[None])
        return [(int(self.head.ids[column]), log_p) for column, log_p in best]

    def tree(self, length: int, draft_tokens: int, topk: int, depth: int | None = None) -> Plain:
        """The tree below the root, which is the last of the first `length` tokens."""
        anchor = length - 1
        rows = self.head.rows(self.text[anchor], anchor, self.context[:anchor])[:depth]
        logits = [self.head.lm_head @ row for row in rows]
        if self.head.cfg.markov:
            return self.grown(length, rows, logits, draft_tokens, topk)
        rankings = [self.ranking(row, length + d) for d, row in enumerate(logits)]
        return best_paths(rankings, draft_tokens - 1, topk)

    def grown(self, length: int, rows: list[Tensor], logits: list[Tensor], draft_tokens: int, topk: int) -> Plain:
        """EAGLE-2's way: of each level only the `topk` best nodes have children."""
        gaps = [1.0]
        root = Node(self.text[length - 1], 0.0, None, 0)
        rank = self.head.w["markov.w1.weight"].shape[1]
        level, states, candidates = [root], {id(root): torch.zeros(rank, dtype=rows[0].dtype)}, []
        for d, (h, row) in enumerate(zip(rows, logits)):
            found = []
            for node in level:
                added, state = self.head.markov(node.token, h, states[id(node)])
                ranking = self.ranking(row + added, length + d)
                gaps += [a[1] - b[1] for a, b in zip(ranking[:topk], ranking[1:])]
                for token, log_p in ranking[:topk]:
                    child = Node(token, node.score + log_p, None if node is root else node, d + 1)
                    states[id(child)] = state
                    found.append(child)
            candidates += found
            ordered = sorted(found, key=lambda node: -node.score)
            gaps += [a.score - b.score for a, b in zip(ordered[:topk], ordered[1:])]
            level = ordered[:topk]
        order = {id(node): i for i, node in enumerate(candidates)}
        by_score = sorted(candidates, key=lambda node: -node.score)
        if len(by_score) > draft_tokens - 1:
            gaps.append(by_score[draft_tokens - 2].score - by_score[draft_tokens - 1].score)
        return Plain(sorted(by_score[:draft_tokens - 1], key=lambda node: order[id(node)]), [], min(gaps))


def best_paths(rankings: list[list[tuple[int, float]]], n: int, topk: int) -> Plain:
    """The n best nodes by a heap: take the best one; then its next sibling and its first child may follow. In the order
    of a tree: depth by depth, best first."""
    count = itertools.count()
    heap: list = []

    def push(parent: Node | None, depth: int, rank: int) -> None:
        if depth < len(rankings) and rank < topk:
            token, log_p = rankings[depth][rank]
            node = Node(token, (parent.score if parent else 0.0) + log_p, parent, depth + 1)
            heapq.heappush(heap, (-node.score, next(count), rank, node))

    push(None, 0, 0)
    taken = []
    while heap and len(taken) < n:
        _, _, rank, node = heapq.heappop(heap)
        taken.append(node)
        push(node.parent, node.depth - 1, rank + 1)
        push(node, node.depth, 0)
    gaps = [a.score - b.score for a, b in itertools.pairwise(taken)] + [1.0]
    gaps += [taken[-1].score - heap[0][-1].score] if heap else []
    return Plain(sorted(taken, key=lambda node: (node.depth, -node.score)), [], min(gaps))
