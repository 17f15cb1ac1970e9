"""draft.py against a plain builder: a head that is run row by row, trees that are Python lists.

The engine writes the right text with any tree. So only these tests, and those of acceptance, notice a drafter that
reads the wrong position, feature or cache slot.
"""
import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import all_cores
from helpers import Payload, slow_but
from recorder import Cycle, Recorder
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft import Eagle2, EagleHead, Vanilla, load_head
from drafters.eagle1 import EAGLE1_TREE, Eagle1
from engine import Engine
from formats.config import Config
from formats.eagle import VOCAB, find_head
from model import Llama
from sampling import Sampling, gumbel_noise
from tree import Tree

MARGIN = 1e-4  # log-probabilities: closer calls than this may go either way by rounding

# ----- The plain builder -----------------------------------------------------------------------------------------

KeyValue = tuple[Tensor, Tensor]  # rotated key and value of one row, [K, D] each


class PlainHead:
    """The head as the tensors on the hub define it, one row at a time. There is no cache: each row is given the keys
    and values of the rows that it sees."""

    def __init__(self, tensors: dict[str, Tensor], cfg: Config, target: Llama) -> None:
        dtype = target.embed.weight.dtype
        self.w = {name.removeprefix("layers.0."): t.to(dtype) for name, t in tensors.items()}
        self.cfg, self.embed, self.lm_head = cfg, target.embed.weight, target.lm_head.weight

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[name + ".weight"] @ x
        return y + self.w[name + ".bias"] if name + ".bias" in self.w else y

    def rotate(self, x: Tensor, position: int) -> Tensor:
        """x [heads, D]: the pair (i, i + D/2) turns by position * theta^(-2i/D)."""
        half = self.cfg.head_dim // 2
        angle = position * self.cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x[:, :half], x[:, half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=1)

    def enter(self, token: int, feature: Tensor) -> Tensor:
        return self.linear("fc", torch.cat((self.embed[token], feature)))

    def key_value(self, token: int, feature: Tensor, position: int) -> KeyValue:
        x, size = self.enter(token, feature), self.cfg.head_dim
        return (self.rotate(self.linear("self_attn.k_proj", x).view(-1, size), position),
                self.linear("self_attn.v_proj", x).view(-1, size))

    def output(self, token: int, feature: Tensor, position: int, seen: list[KeyValue]) -> Tensor:
        """The predicted feature after a row; `seen` ends with the row's own key and value."""
        x, size = self.enter(token, feature), self.cfg.head_dim
        q = self.rotate(self.linear("self_attn.q_proj", x).view(-1, size), position)
        keys, values = (torch.stack(both).repeat_interleave(len(q) // both[0].shape[0], dim=1)
                        for both in zip(*seen, strict=True))  # [rows, H, D]
        weights = torch.einsum("hd,rhd->hr", q, keys).div(size ** 0.5).softmax(-1)
        x = x + self.linear("self_attn.o_proj", torch.einsum("hr,rhd->hd", weights, values).flatten())
        normed = x * (x.square().mean() + self.cfg.rms_norm_eps).rsqrt() * self.w["post_attention_layernorm.weight"]
        gate, up = self.linear("mlp.gate_proj", normed), self.linear("mlp.up_proj", normed)
        return x + self.linear("mlp.down_proj", F.silu(gate) * up)

    def rankings(self, features: list[Tensor], noise: Tensor | float) -> list[list[tuple[int, float]]]:
        """After each feature the 11 most probable next tokens with their log-probabilities, best first. All are of one
        position in the text, to whose logits sampling will add `noise`."""
        logits = torch.stack(features) @ self.lm_head.T + noise
        best = logits.topk(11)
        log_p = best.values.double() - logits.logsumexp(-1, keepdim=True).double()
        return [list(zip(*both, strict=True)) for both in zip(best.indices.tolist(), log_p.tolist(), strict=True)]


@dataclass
class Node:
    """A drafted token. `parent` None: a child of the root. `seen`: what the row of this node attends to."""
    token: int
    score: float
    parent: "Node | None"
    depth: int
    feature: Tensor | None = None  # predicted after this token, if it was fed
    seen: list[KeyValue] = field(default_factory=list)


@dataclass
class Plain:
    """What a builder did: the nodes of the tree in order, the nodes it fed level by level, and its closest decision."""
    nodes: list[Node]
    fed: list[list[Node]]
    margin: float


class Builder:
    """Grows trees over a text whose target features are known. Rows of committed tokens see true features."""

    def __init__(self, head: PlainHead, text: list[int], features: Tensor, sampling: Sampling = Sampling()) -> None:
        self.head, self.text, self.features, self.sampling = head, text, features, sampling
        self.entries = [head.key_value(text[i + 1], features[i], i) for i in range(len(text) - 1)]

    def start(self, length: int) -> Tensor:
        """The feature predicted for the root, which is the last of the first `length` tokens."""
        last = length - 2
        return self.head.output(self.text[last + 1], self.features[last], last, self.entries[:last + 1])

    def rankings(self, place: int, features: list[Tensor]) -> list[list[tuple[int, float]]]:
        """The children, at this place in the text, of nodes with these features."""
        noise, s = 0.0, self.sampling
        if s.temperature:
            draws = gumbel_noise(torch.tensor(s.seed), torch.tensor([place]), len(self.head.lm_head))
            noise = s.temperature * draws[0]
        return self.head.rankings(features, noise)

    def feed(self, node: Node, above: Tensor, length: int) -> None:
        """Run the head on `node`, whose parent's predicted feature is `above`."""
        position = length - 2 + node.depth  # the root's children follow entry length - 2
        context = node.parent.seen if node.parent else self.entries[:length - 1]
        node.seen = [*context, self.head.key_value(node.token, above, position)]
        node.feature = self.head.output(node.token, above, position, node.seen)

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
        ranked = sorted(candidates, key=lambda node: -node.score)
        if len(ranked) > draft_tokens - 1:
            gaps.append(ranked[draft_tokens - 2].score - ranked[draft_tokens - 1].score)
        return Plain(sorted(ranked[:draft_tokens - 1], key=lambda node: order[id(node)]), fed, min(gaps))

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
            and [{j for j in range(64) if bits >> j & 1} for bits in tree.ancestors.tolist()] == ancestors)


def check_rows(cycle: Cycle, plain: Plain, builder: Builder, atol: float) -> None:
    """Check what the head was given: tokens, features, positions, and by the mask exactly the rows each one may see."""
    length, (extend, *levels) = cycle.length, cycle.calls
    first, n = length - 1 - cycle.committed, cycle.committed
    assert extend.tokens[:n] == builder.text[first + 1:length]
    given = [builder.head.enter(builder.text[i + 1], builder.features[i]) for i in range(first, length - 1)]
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


def check_cycles(recorder: Recorder, builder: Builder, grow, atol: float) -> tuple[int, int]:
    """Compare every cycle with `grow(length)`. Returns how many cycles there were and how many were close calls: if a
    choice hung on less than MARGIN, another tree, or the same one grown in another order, is right too."""
    close = 0
    for cycle in recorder.cycles:
        plain = grow(cycle.length)
        fed = [call.tokens for call in cycle.calls[1:]] == [[node.token for node in level] for level in plain.fed]
        if fed and same_tree(cycle.tree, plain, builder.text[cycle.length - 1]):
            check_rows(cycle, plain, builder, atol)
        else:
            assert plain.margin < MARGIN, f"another tree at length {cycle.length}"
            close += 1
    return len(recorder.cycles), close


# ----- Trees -----------------------------------------------------------------------------------------------------

SHAPES = [(2, 1, 1), (2, 8, 10), (4, 3, 1), (9, 8, 1), (6, 5, 2), (64, 6, 2), (20, 4, 3), (64, 1, 10), (11, 1, 10),
          (60, 6, 10), (64, 8, 10), (33, 2, 7), (64, 8, 4), (17, 5, 9)]
HEADS = [{}, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20},
         {"fc_bias": True, "qkv_bias": True}, {"head_dim": 12, "rope_theta": 500.0, "rms_norm_eps": 1e-2}]


def tiny_run(drafter: Eagle1 | Eagle2, model: Llama, seed: int) -> tuple[Recorder, Builder]:
    recorder = Recorder(drafter)
    ids, sampling = tiny.prompt(seed, 3 + seed % 5), Sampling(temperature=float(seed % 2), seed=seed)
    text = ids + sum(Engine(model, drafter, 96).generate(ids, 16, sampling), [])
    plain = PlainHead(tiny.published(drafter.head), drafter.head.cfg, model)
    return recorder, Builder(plain, text, tiny.features(model, text), sampling)


@pytest.mark.parametrize("shape", slow_but(1, SHAPES))
def test_eagle2_tiny(shape: tuple[int, int, int]) -> None:
    """Fails if another tree is drafted: by a feature, token or position shifted by one, a node that sees its siblings
    or its parent's siblings, scores that are not summed, levels mixed up, a rerank cut at the wrong node."""
    total = close = 0
    for seed, changes in enumerate(HEADS):
        model = tiny.target(seed, num_key_value_heads=(1, 2, 4)[seed % 3])
        drafter = Eagle2(tiny.head(model, seed + 50, **changes), model, *shape)
        recorder, builder = tiny_run(drafter, model, seed)
        found = check_cycles(recorder, builder, lambda length, b=builder: b.eagle2(length, *shape), 1e-9)
        total, close = total + found[0], close + found[1]
    assert total >= 20 and close <= total // 10


@pytest.mark.slow
@pytest.mark.parametrize("choices", [EAGLE1_TREE, [(0,)], [(3,)], [(0,), (1,), (0, 2), (1, 0), (1, 0, 3), (1, 0, 3, 1)],
                                     [(2,), (0,), (2, 1), (0, 0), (0, 0, 0), (2, 1, 0), (0, 0, 1)]])
def test_eagle1_tiny(choices: list[tuple[int, ...]]) -> None:
    """Fails if a node of the fixed tree is under the wrong parent, has the wrong rank, or is fed another's feature."""
    total = close = 0
    for seed, changes in enumerate(HEADS):
        model = tiny.target(seed)
        drafter = Eagle1(tiny.head(model, seed + 50, **changes), model, choices)
        recorder, builder = tiny_run(drafter, model, seed)
        found = check_cycles(recorder, builder, lambda length, b=builder: b.eagle1(length, choices), 1e-9)
        total, close = total + found[0], close + found[1]
    assert total >= 20 and close <= total // 10


def test_eagle1_tree_is_the_published_one() -> None:
    """Fails if a path in the list is mistyped: there are 4, 8, 8, 3 and 2 nodes by level, each with its parent."""
    assert [sum(len(path) == depth for path in EAGLE1_TREE) for depth in range(1, 6)] == [4, 8, 8, 3, 2]
    assert len(set(EAGLE1_TREE)) == 25
    assert all(path[:-1] in EAGLE1_TREE for path in EAGLE1_TREE if len(path) > 1)


@pytest.fixture(scope="module")
def plain_demo_head(demo: Path, demo_model: Llama) -> PlainHead:
    """The demo head, read straight from its files without load_head."""
    folder = demo / "eagle"
    return PlainHead(load_file(folder / "model.safetensors"), Config.load(folder), demo_model)


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@torch.inference_mode()
def test_eagle2_demo(demo_runs, demo_model: Llama, plain_demo_head: PlainHead) -> None:
    """Fails if the head in heads/ drafts another tree, in fp32, at any of 200 positions of 16 texts."""
    total = close = 0
    with all_cores():
        for _, text, recorder in demo_runs:
            builder = Builder(plain_demo_head, text, tiny.features(demo_model, text))
            found = check_cycles(recorder, builder, lambda length, b=builder: b.eagle2(length, 60, 6, 10), 2e-3)
            total, close = total + found[0], close + found[1]
    assert total >= 200
    assert close <= total // 20


@pytest.mark.slow
@torch.inference_mode()
def test_eagle1_demo(demo_model: Llama, demo_head: EagleHead, demo_prompts, plain_demo_head: PlainHead) -> None:
    """Fails if it fills EAGLE-1's fixed tree with other tokens, on one text."""
    with all_cores():
        recorder = Recorder(Eagle1(demo_head, demo_model))
        text = demo_prompts[0] + sum(Engine(demo_model, recorder.drafter, 512).generate(demo_prompts[0], 32), [])
        builder = Builder(plain_demo_head, text, tiny.features(demo_model, text))
        total, close = check_cycles(recorder, builder, lambda length: builder.eagle1(length, EAGLE1_TREE), 2e-3)
    assert total >= 5 and close <= 1


@pytest.mark.parametrize("shape", [(1, 6, 10), (65, 6, 10), (60, 0, 10), (60, 9, 10), (60, 6, 0), (60, 6, 11)])
def test_impossible_shapes(shape: tuple[int, int, int]) -> None:
    """Fails if a tree is accepted that overflows the 64 bits of a node's ancestors or the spare cache slots."""
    model = tiny.target()
    with pytest.raises(ValueError, match="draft_tokens"):
        Eagle2(tiny.head(model), model, *shape)


# ----- Some tokens only -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", [Eagle1, Eagle2])
def test_draft_vocabulary(kind: type, temperature: float) -> None:
    """Fails if rows of the lm_head, noise and token ids of a draft vocabulary do not belong together: the trees must be
    those of the whole lm_head with the other tokens made impossible, and the text must be vanilla's."""
    model, head = tiny.pair(4, 0.1)
    ids, sampling = tiny.prompt(4, 9), Sampling(temperature, seed=3)
    vocab, runs = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 17, 19, 23]), []
    for head.vocab in (vocab, None):
        drafter = kind(head, model)
        recorder = Recorder(drafter)
        if head.vocab is None:
            impossible, read = torch.full((24,), -1e9).index_fill(0, vocab, 0), drafter.read_logits

            def read_less(*args, read=read, impossible=impossible):
                logits, fc_of_feature = read(*args)
                return logits + impossible, fc_of_feature

            drafter.read_logits = read_less
        runs.append((list(Engine(model, drafter, 96).generate(ids, 30, sampling)), recorder.cycles))
    (ours, mine), (theirs, full) = runs
    assert ours == theirs and sum(ours, []) == sum(Engine(model, Vanilla(), 96).generate(ids, 30, sampling), [])
    for a, b in zip(mine, full, strict=True):
        assert torch.equal(a.tree.tokens, b.tree.tokens) and torch.isin(a.tree.tokens[1:], vocab).all()


def test_load_draft_vocabulary(tmp_path: Path) -> None:
    """Fails if the rarest tokens are kept instead of the most frequent, or if a bad list is not refused."""
    target = tiny.target(3)
    folder = tiny.save_head(tiny.head(target, 4), tmp_path)
    assert load_head(folder, target).vocab is None and load_head(folder, target, 0).vocab is None
    with pytest.raises(FileNotFoundError, match="draft_vocab.json"):
        load_head(folder, target, 12)
    listed = [9, 3, 20, 1, 0, 7, 8, 5, 4, 6, 22, 2]
    (folder / VOCAB).write_text(json.dumps(listed))
    assert load_head(folder, target).vocab.tolist() == sorted(listed)
    assert load_head(folder, target, 10).vocab.tolist() == sorted(listed[:10])
    assert load_head(folder, target, 0).vocab is None
    for limit in (9, 13):
        with pytest.raises(ValueError, match="12 tokens: --draft_vocab takes 10 to 12"):
            load_head(folder, target, limit)
    for wrong in (listed[:9], [*listed, 24], [*listed, -1], [*listed, 9], [*listed, True], {"a": 1}):
        (folder / VOCAB).write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="different ids below 24"):
            load_head(folder, target)
    (folder / VOCAB).write_text("[1, 2")
    with pytest.raises(ValueError, match="different ids below 24"):
        load_head(folder, target)


# ----- Loading ---------------------------------------------------------------------------------------------------


def outputs(head: EagleHead, target: Llama) -> Tensor:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, 7, target.cfg.hidden_size, generator=random, dtype=torch.float64)
    head.allocate_cache(16)
    embedded = target.embed(torch.tensor([tiny.prompt(0, 7)]))
    return head(head.fc(torch.cat((embedded, features.to(embedded)), -1)), head.rope[:, :7])


@pytest.mark.parametrize("changes", [*HEADS, {"fc_bias": True}, {"qkv_bias": True}, {"hidden_act": "silu"}])
@pytest.mark.parametrize("form", ["safetensors", "bin", "with embedding"])
def test_load_head(changes: dict, form: str, tmp_path: Path) -> None:
    """Fails if a bias is dropped or demanded, if q, k and v are fused in another order, if the target's shape is taken
    for the head's own, or if the file's embedding is used instead of the target's."""
    target = tiny.target(3)
    wanted = tiny.head(target, 4, **changes)
    extra = {"embed_tokens.weight": torch.randn(24, 32)} if form == "with embedding" else {}
    folder = tiny.save_head(wanted, tmp_path, **extra)
    if form == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    loaded = load_head(folder, target)
    assert torch.allclose(outputs(loaded, target), outputs(wanted, target), atol=1e-9)
    plain = PlainHead(tiny.published(wanted), wanted.cfg, target)
    random = torch.Generator().manual_seed(0)
    features = torch.randn(7, 32, generator=random, dtype=torch.float64)
    tokens = tiny.prompt(0, 7)
    seen = [plain.key_value(tokens[i], features[i], i) for i in range(7)]
    rows = torch.stack([plain.output(tokens[i], features[i], i, seen[:i + 1]) for i in range(7)])
    assert torch.allclose(outputs(loaded, target)[0], rows, atol=1e-6)  # the model's RoPE table is made in fp32


def test_load_head_takes_the_targets_dtype(tmp_path: Path) -> None:
    """Fails if weights keep the file's half precision beside a target in fp32."""
    wanted = tiny.head(tiny.target())
    folder = tiny.save_head(wanted, tmp_path)
    half = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors")
    head = load_head(folder, tiny.target(dtype=torch.float32))
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert torch.equal(head.fc.weight, wanted.fc.weight.bfloat16().float())


def rewrite(folder: Path, how: str) -> None:
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, raw, data = load_file(file), json.loads(config.read_text()), file.read_bytes()
    changed = {
        "EAGLE-3": {"midlayer.self_attn.q_proj.weight": torch.zeros(32, 64), "d2t": torch.zeros(24)} | tensors,
        "no fc": {name: t for name, t in tensors.items() if name != "fc.weight"},
        "no k": {name: t for name, t in tensors.items() if "k_proj" not in name},
        "k of another width": tensors | {"layers.0.self_attn.k_proj.weight": torch.zeros(16, 31)},
        "k of another height": tensors | {"layers.0.self_attn.k_proj.weight": torch.zeros(24, 32)},
        "q bias alone": tensors | {"layers.0.self_attn.q_proj.bias": torch.zeros(32)},
        "two layers": tensors | {"layers.1.mlp.down_proj.weight": torch.zeros(32, 48)},
        "input norm": tensors | {"layers.0.input_layernorm.weight": torch.ones(32)},
        "other embedding": tensors | {"embed_tokens.weight": torch.zeros(25, 32)},
    }
    configs = {"other hidden": {"hidden_size": 64}, "other vocabulary": {"vocab_size": 25}}
    if how in changed:
        save_file(changed[how], file)
    elif how in configs:
        config.write_text(json.dumps(raw | configs[how]))
    elif how == "no config":
        config.unlink()
    elif how == "truncated":
        file.write_bytes(data[:-10])
    else:
        file.unlink()
        binary = folder / "pytorch_model.bin"
        if how == "payload":
            binary.write_bytes(pickle.dumps({"fc.weight": Payload(folder / "executed")}))
        elif how == "zipped payload":
            torch.save({"fc.weight": Payload(folder / "executed")}, binary)
        elif how == "a list":
            torch.save(list(tensors.values()), binary)
        elif how == "not tensors":
            torch.save({name: 1 for name in tensors}, binary)
        elif how == "truncated bin":
            torch.save(tensors, binary)
            binary.write_bytes(binary.read_bytes()[:-200])
        elif how == "empty bin":
            binary.write_bytes(b"")
        elif how == "text bin":
            binary.write_text("<html>404: not found</html>")


@pytest.mark.parametrize("how, message", [
    ("EAGLE-3", "EAGLE-3"), ("no fc", "fc.weight"), ("no k", "k_proj"), ("k of another width", "k_proj"),
    ("k of another height", "wqkv"), ("q bias alone", "bias"), ("two layers", "layers.1"),
    ("input norm", "input_layernorm"), ("other embedding", "another model"), ("other hidden", "another model"),
    ("other vocabulary", "another model"), ("no config", "config.json"), ("truncated", "damaged"),
    ("payload", "pytorch_model.bin"), ("zipped payload", "pytorch_model.bin"), ("a list", "pytorch_model.bin"),
    ("not tensors", "pytorch_model.bin"), ("truncated bin", "damaged"), ("empty bin", "empty"),
    ("text bin", "web page"), ("no file", "pytorch_model.bin")])
def test_refused_head(how: str, message: str, tmp_path: Path) -> None:
    """Fails if a head of another model or kind, or a damaged one, is loaded or ends in a traceback, or if a pickle runs
    code."""
    target = tiny.target()
    folder = tiny.save_head(tiny.head(target), tmp_path / "eagle")
    load_head(folder, target)
    rewrite(folder, how)
    with pytest.raises((ValueError, OSError)) as error:
        load_head(folder, target)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "executed").exists()


def test_no_head_there(tmp_path: Path) -> None:
    """Fails if the message does not say where a head comes from."""
    with pytest.raises(FileNotFoundError, match="--draft"):
        load_head(tmp_path / "eagle", tiny.target())


def test_find_head(tmp_path: Path) -> None:
    """Fails if an int8 model is given the bfloat16 head although there is an int8 one, or a file that is not there."""
    (tmp_path / "eagle").mkdir()
    for name in ("model", "model-int8", "model-int4", "eagle/model-int8"):
        (tmp_path / f"{name}.safetensors").touch()
    eagle = tmp_path / "eagle"
    assert find_head(tmp_path) == eagle == find_head(tmp_path / "model.safetensors")
    assert find_head(tmp_path / "model-int8.safetensors") == eagle / "model-int8.safetensors"
    assert find_head(tmp_path / "model-int4.safetensors") == eagle
