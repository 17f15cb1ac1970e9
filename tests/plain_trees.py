"""Trees drafted the plain way: a head that is run row by row, trees that are Python lists; and the comparison of a
drafter's cycles with them."""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from helpers import bits_of
from recorder import Cycle, Recorder
from torch import Tensor

from formats.config import Config
from formats.eagle3 import Eagle3Config
from formats.rope import LLAMA3_ROPE
from model import Llama
from sampling import Sampling, gumbel_noise
from tree import Tree

MARGIN = 1e-4  # log-probabilities: closer calls than this may go either way by rounding

KeyValue = tuple[Tensor, Tensor]  # rotated key and value of one row in one layer, [K, D] each
Row = tuple[KeyValue, ...]  # one for each layer


def rotate(x: Tensor, position: int, cfg: Config) -> Tensor:
    """x [heads, D]: the pair (i, i + D/2) turns by position * theta^(-2i/D). With Llama 3's scaling a pair that turns
    less than `low` times within the old context turns `factor` times slower, one that turns more than `high` times as
    before, and the others by a mixture of the two."""
    half = x.shape[1] // 2
    angle = torch.tensor([cfg.rope_theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    if cfg.rope_scaling:
        factor, low, high, context = (cfg.rope_scaling[key] for key in LLAMA3_ROPE)
        for i, speed in enumerate(angle.tolist()):
            share = min(max((context * speed / (2 * math.pi) - low) / (high - low), 0), 1)
            angle[i] = share * speed + (1 - share) * speed / factor
    angle = position * angle
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[:, :half], x[:, half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)


def attend(q: Tensor, seen: list[KeyValue]) -> Tensor:
    """q [H, D] over the keys and values of some rows: [H * D]."""
    keys, values = (torch.stack(both).repeat_interleave(len(q) // both[0].shape[0], dim=1)
                    for both in zip(*seen, strict=True))  # [rows, H, D]
    weights = torch.einsum("hd,rhd->hr", q, keys).div(q.shape[1] ** 0.5).softmax(-1)
    return torch.einsum("hr,rhd->hd", weights, values).flatten()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def ranked(logits: Tensor) -> list[list[tuple[int, float]]]:
    """The 11 most probable tokens of each row of logits [N, V] with their log-probabilities, best first."""
    best = logits.topk(min(11, logits.shape[-1]))
    log_p = best.values.double() - logits.logsumexp(-1, keepdim=True).double()
    return [list(zip(*both, strict=True)) for both in zip(best.indices.tolist(), log_p.tolist(), strict=True)]


class PlainHead:
    """An EAGLE-1/2 head as the tensors on the hub define it, one row at a time. There is no cache: each row is given
    the keys and values of the rows before it that it sees."""

    def __init__(self, tensors: dict[str, Tensor], cfg: Config, target: Llama) -> None:
        dtype = target.embed.weight.dtype
        self.w = {name.removeprefix("layers.0."): t.to(dtype) for name, t in tensors.items()}
        self.cfg, self.embed, self.lm_head = cfg, target.embed.weight, target.lm_head.weight
        self.vocab_size = len(self.lm_head)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def make_input(self, token: int, feature: Tensor) -> Tensor:
        return self.linear("fc", torch.cat((self.embed[token], feature)))

    def run(self, token: int, feature: Tensor, position: int, seen: list[Row]) -> tuple[Row, Tensor]:
        """The key and value of a row, and the feature predicted after it."""
        x, size = self.make_input(token, feature), self.cfg.head_dim
        q, k = (rotate(self.linear(f"self_attn.{name}_proj", x).view(-1, size), position, self.cfg) for name in "qk")
        row = ((k, self.linear("self_attn.v_proj", x).view(-1, size)),)
        x = x + self.linear("self_attn.o_proj", attend(q, [layers[0] for layers in (*seen, row)]))
        normed = norm(x, self.w["post_attention_layernorm.weight"], self.cfg.rms_norm_eps)
        gate, up = self.linear("mlp.gate_proj", normed), self.linear("mlp.up_proj", normed)
        return row, x + self.linear("mlp.down_proj", F.silu(gate) * up)

    def rankings(self, features: list[Tensor], noise: Tensor | float) -> list[list[tuple[int, float]]]:
        """After each feature the 11 most probable next tokens with their log-probabilities, best first. All are of one
        position in the text, to whose logits sampling will add `noise`."""
        return ranked(torch.stack(features) @ self.lm_head.T + noise)


class PlainHead3:
    """An EAGLE-3 head, the same way, from its tensors as formats/eagle3.py names them. ids [Vd]: the target's tokens,
    in the order of the lm_head's rows."""

    def __init__(self, tensors: dict[str, Tensor], cfg: Eagle3Config, ids: Tensor | None, target: Llama) -> None:
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

    def join(self, hidden: Tensor) -> Tensor:
        """g of one token: what fc makes of its taps [k * C]; or its features themselves for a head without taps."""
        if not self.cfg.taps:
            return hidden
        if "fc_norms.0.weight" in self.w:
            parts = hidden.chunk(len(self.cfg.taps))
            hidden = torch.cat([self.norm(f"fc_norms.{i}", part) for i, part in enumerate(parts)])
        if "input_norm.weight" in self.w:
            hidden = self.norm("input_norm", hidden)
        return self.linear("fc", hidden)

    def make_input(self, token: int, feature: Tensor) -> Tensor:
        """What the first layer reads."""
        return torch.cat((self.norm("layers.0.embed_norm", self.embed[token]),
                          self.norm("layers.0.feature_norm", feature)))

    def run(self, token: int, feature: Tensor, position: int, seen: list[Row]) -> tuple[Row, Tensor]:
        """The keys and values of a row, and what the next step drafts from."""
        sizes, row, h = self.cfg.layer, (), feature
        for i in range(sizes.num_layers):
            at, x, residual = f"layers.{i}.", h, h
            if self.cfg.wide[i]:
                normed = self.norm(at + "feature_norm", h)
                x = torch.cat((self.norm(at + "embed_norm", self.embed[token]), normed))
                residual = normed if self.cfg.norm_before_residual else h
            else:
                x = self.norm(at + "attn_norm", h)
            rows = [n * sizes.head_dim for n in (sizes.num_heads, sizes.num_kv_heads, sizes.num_kv_heads)]
            q, k, v = (y.view(-1, sizes.head_dim) for y in self.linear(at + "wqkv", x).split(rows))
            if at + "q_norm.weight" in self.w:
                q, k = self.norm(at + "q_norm", q), self.norm(at + "k_norm", k)
            q, k = (rotate(y, position, sizes) for y in (q, k))
            row += ((k, v),)
            h = residual + self.linear(at + "wo", attend(q, [layers[i] for layers in seen] + [(k, v)]))
            gate, up = self.linear(at + "w13", self.norm(at + "mlp_norm", h)).chunk(2)
            h = h + self.linear(at + "w2", F.silu(gate) * up)
        return row, self.norm("norm", h) if self.cfg.norm_output else h

    def rankings(self, features: list[Tensor], noise: Tensor | float) -> list[list[tuple[int, float]]]:
        h = torch.stack(features)
        if "norm.weight" in self.w and not self.cfg.norm_output:
            h = self.norm("norm", h)
        noise = noise[self.ids] if isinstance(noise, Tensor) else noise
        return [[(int(self.ids[column]), log_p) for column, log_p in row] for row in ranked(h @ self.lm_head.T + noise)]


@dataclass
class Node:
    """A drafted token. `parent` None: a child of the root. `seen`: what the row of this node attends to."""
    token: int
    score: float
    parent: "Node | None"
    depth: int
    feature: Tensor | None = None  # predicted after this token, if it was fed
    seen: list[Row] = field(default_factory=list)


@dataclass
class Plain:
    """What a builder did: the nodes of the tree in order, the nodes it fed level by level, and its closest decision."""
    nodes: list[Node]
    fed: list[list[Node]]
    margin: float


class Builder:
    """Grows trees over a text whose target features are known. Rows of committed tokens see true features. features
    [tokens, any]: for an EAGLE-3 head, what fc makes of the taps."""

    def __init__(self, head: PlainHead | PlainHead3, text: list[int], features: Tensor, sampling: Sampling = Sampling()
                 ) -> None:
        self.head, self.text, self.features, self.sampling = head, text, features, sampling
        self.entries, self.outputs = [], []
        for i in range(len(text) - 1):
            row, output = head.run(text[i + 1], features[i], i, self.entries)
            self.entries.append(row)
            self.outputs.append(output)

    def start(self, length: int) -> Tensor:
        """What is predicted for the root, which is the last of the first `length` tokens."""
        return self.outputs[length - 2]

    def rankings(self, place: int, features: list[Tensor]) -> list[list[tuple[int, float]]]:
        """The children, at this place in the text, of nodes with these features."""
        noise, s = 0.0, self.sampling
        if s.temperature:
            draws = gumbel_noise(torch.tensor(s.seed), torch.tensor([place]), self.head.vocab_size)
            noise = s.temperature * draws[0]
        return self.head.rankings(features, noise)

    def feed(self, node: Node, above: Tensor, length: int) -> None:
        """Run the head on `node`, whose parent's predicted feature is `above`."""
        position = length - 2 + node.depth  # the root's children follow entry length - 2
        context = node.parent.seen if node.parent else self.entries[:length - 1]
        row, node.feature = self.head.run(node.token, above, position, context)
        node.seen = [*context, row]

    def eagle2(self, length: int, draft_tokens: int, draft_depth: int, topk: int) -> Plain:
        gaps = [1.0]

        def best(nodes: list[Node], n: int) -> list[Node]:
            ordered = sorted(nodes, key=lambda node: -node.score)  # stable
            gaps.extend(a.score - b.score for a, b in zip(ordered[:n], ordered[1:n + 1], strict=False))
            return ordered[:n]

        def children(ranking: list[tuple[int, float]], parent: Node | None) -> list[Node]:
            gaps.extend(a[1] - b[1] for a, b in zip(ranking[:topk], ranking[1:], strict=False))
            above, depth = (parent.score, parent.depth) if parent else (0.0, 0)
            return [Node(token, above + log_p, parent, depth + 1) for token, log_p in ranking[:topk]]

        start = self.start(length)
        candidates = level = children(self.rankings(length, [start])[0], None)
        fed = []
        for depth in range(1, draft_depth):
            fed.append(level)
            for node in level:
                self.feed(node, node.parent.feature if node.parent else start, length)
            found = []
            rankings = self.rankings(length + depth, [node.feature for node in level])
            for node, ranking in zip(level, rankings, strict=True):
                found += children(ranking, node)
            candidates = candidates + found
            level = best(found, topk)
        order = {id(node): i for i, node in enumerate(candidates)}
        by_score = sorted(candidates, key=lambda node: -node.score)
        if len(by_score) > draft_tokens - 1:
            gaps.append(by_score[draft_tokens - 2].score - by_score[draft_tokens - 1].score)
        return Plain(sorted(by_score[:draft_tokens - 1], key=lambda node: order[id(node)]), fed, min(gaps))

    def eagle1(self, length: int, choices: list[tuple[int, ...]]) -> Plain:
        start, made, gaps = self.start(length), {}, [1.0]
        fed: dict[int, list[Node]] = {}
        for path in sorted(choices, key=lambda path: (len(path), path)):
            parent = made.get(path[:-1])
            if parent and parent.feature is None:
                self.feed(parent, parent.parent.feature if parent.parent else start, length)
                fed.setdefault(parent.depth, []).append(parent)
            [ranking] = self.rankings(length + len(path) - 1, [parent.feature if parent else start])
            gaps += [ranking[i][1] - ranking[i + 1][1] for i in (path[-1] - 1, path[-1]) if i >= 0]
            made[path] = Node(ranking[path[-1]][0], 0.0, parent, len(path))
        return Plain(list(made.values()), list(fed.values()), min(gaps))


def same_tree(tree: Tree, plain: Plain, root: int) -> bool:
    """Equal tokens, parents, depth, order, and attention between the nodes."""
    index = {id(node): i for i, node in enumerate(plain.nodes, 1)}
    parents = [index[id(node.parent)] if node.parent else 0 for node in plain.nodes]  # a KeyError: an orphan
    ancestors = [{0}]
    for i, parent in enumerate(parents, 1):
        ancestors.append(ancestors[parent] | {i})
    return (tree.tokens.tolist() == [root] + [node.token for node in plain.nodes]
            and tree.parents.tolist() == [0, *parents]
            and tree.depth.tolist() == [0] + [node.depth for node in plain.nodes]
            and [{j for j in range(128) if bits_of(words) >> j & 1} for words in tree.ancestors.tolist()] == ancestors)


def check_rows(cycle: Cycle, plain: Plain, builder: Builder, atol: float) -> None:
    """Check what the head was given: tokens, features, positions, and by the mask exactly the rows each one may see."""
    length, (extend, *levels) = cycle.length, cycle.calls
    first, n = length - 1 - cycle.committed, cycle.committed
    assert extend.tokens[:n] == builder.text[first + 1:length]
    given = [builder.head.make_input(builder.text[i + 1], builder.features[i]) for i in range(first, length - 1)]
    assert torch.allclose(extend.given[:n], torch.stack(given), atol=atol, rtol=0)
    assert extend.rope_pos[:n] == extend.cache_pos[:n] == list(range(first, length - 1))
    assert extend.seen[:n] == [set(range(i + 1)) for i in range(first, length - 1)]
    assert len(levels) == len(plain.fed)
    slot_of: dict[int, int] = {}
    for call, nodes in zip(levels, plain.fed, strict=True):
        assert call.tokens == [node.token for node in nodes]
        assert call.rope_pos == [length - 2 + node.depth for node in nodes]
        slot_of |= {id(node): slot for node, slot in zip(nodes, call.cache_pos, strict=True)}
        assert len(set(slot_of.values())) == len(slot_of) and min(slot_of.values()) >= length - 1
        for node, seen in zip(nodes, call.seen, strict=True):
            own, up = set(), node
            while up:
                own.add(slot_of[id(up)])
                up = up.parent
            assert seen == own | set(range(length - 1))


def check_cycles(recorder: Recorder, builder: Builder, grow, atol: float, margin: float = MARGIN) -> tuple[int, int]:
    """Compare every cycle with `grow(length)`. Returns how many cycles there were and how many were close calls: if a
    choice hung on less than `margin`, another tree, or the same one grown in another order, is right too."""
    close = 0
    for cycle in recorder.cycles:
        plain = grow(cycle.length)
        fed = [call.tokens for call in cycle.calls[1:]] == [[node.token for node in level] for level in plain.fed]
        if fed and same_tree(cycle.tree, plain, builder.text[cycle.length - 1]):
            check_rows(cycle, plain, builder, atol)
        else:
            assert plain.margin < margin, f"another tree at length {cycle.length}"
            close += 1
    return len(recorder.cycles), close
