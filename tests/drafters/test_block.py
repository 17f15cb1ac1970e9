"""drafters/block.py: the whole of a proposal against an uncached recomputation with a heap (tests/plain_blocks.py), the
text against plain decoding's, and what is remembered of it.

Tiny random models, in float64 or float32 on the CPU.
"""
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import block_published
import pytest
import tiny
import torch
from helpers import slow_but
from plain_blocks import BlockBuilder, PlainBlock, best_paths
from plain_trees import same_tree
from torch import Tensor

from draft import Vanilla
from drafters import block
from drafters.block import Block, BlockHead
from drafters.heads import load_head
from drafters.lookup import Retrieval
from engine import Engine
from model import Llama
from ops.attention import TreeMask
from quant.linear import MODES
from sampling import Sampling
from tree import State, Tree, empty_candidates, grid, rerank

UNSORTED = [9, 3, 4, 17, 22, 0, 1, 8, 12, 11, 10, 20, 5, 6]
HEADS = {"anchor first": {}, "fill in": {"anchor_first": False}, "sees all": {"causal": False},
         "fill in, sees all": {"causal": False, "anchor_first": False, "block_size": 4},
         "ids": {"ids": UNSORTED}, "own parts": {"names": ("embed.weight", "lm_head.weight", "layers.0.wqkv.bias")},
         "own rows": {"ids": UNSORTED, "names": ("lm_head.weight",)}, "one layer, taps": {"layers": 1, "taps": (1,)},
         "head_dim": {"head_dim": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "rope_theta": 100.0},
         "two rows": {"block_size": 2, "anchor_first": False}, "vanilla": {"markov": "vanilla"},
         "gated": {"markov": "gated", "ids": UNSORTED}, "rnn": {"markov": "rnn", "causal": False}}
WINDOWS = {"one layer slides": (7, None), "two windows": (3, 9), "a row sees its block alone": (1, 1)}  # of the layers


def taps_of(model: Llama, text: list[int], taps: tuple[int, ...]) -> Tensor:
    model.allocate_rope(len(text))
    return model.forward_with_taps(torch.tensor([text]), torch.arange(len(text)), taps=taps)[1][0]


def record(drafter: Block) -> list[tuple[int, Tree]]:
    """The trees that the drafter proposes from now on, with the length of the text before each."""
    trees, original = [], drafter.propose

    def propose(state: State) -> Tree:
        length = int(state.length)
        trees.append((length, original(state)))
        return trees[-1][1]

    drafter.propose = propose
    return trees


def check(model: Llama, head: BlockHead, seed: int, nodes: int, topk: int, margin: float = 1e-9,
          plain: PlainBlock | None = None, new_tokens: int = 14) -> int:
    """Compare each cycle's tree with the plain builder's. Returns how many cycles there were."""
    drafter = Block(head, model, nodes, topk)
    trees = record(drafter)
    ids, sampling = tiny.prompt(seed, 3 + seed % 5), Sampling(temperature=float(seed % 2), seed=seed)
    text = ids + sum(Engine(model, drafter, 96).generate(ids, new_tokens, sampling), [])
    plain = plain or PlainBlock(head.state_dict(), head.cfg, head.vocab, model)
    builder = BlockBuilder(plain, text, taps_of(model, text, head.cfg.taps), sampling)
    for length, tree in trees:
        expected = builder.tree(length, len(tree.tokens), drafter.topk, drafter.depth)
        assert same_tree(tree, expected, text[length - 1]) or expected.margin < margin, f"another tree at {length}"
    return len(trees)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_trees(kind: str) -> None:
    """Fails if a row has another place, sees another row or a stale context entry, if a norm or the layout's shift is
    left out, if noise goes to another depth, or if the tree is not the best one. With odd seeds the text is sampled."""
    cycles = 0
    for seed in range(4):
        dtype = torch.float32 if seed < 2 else torch.float64
        model = tiny.target(seed, dtype)
        head = tiny.block(model, seed + 9, **HEADS[kind])
        nodes, topk = [(20, 5), (8, 3), (60, 10), (2, 1)][seed]
        cycles += check(model, head, seed, nodes, topk, 1e-9 if dtype == torch.float64 else 1e-3)
    assert cycles > 20


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", WINDOWS)
def test_sliding_windows(kind: str, causal: bool) -> None:
    """Fails if a row sees a context entry too much or too few, if a layer has the window of another one, or if rows of
    the block are cut too."""
    for seed in range(2):
        model = tiny.target(seed)
        head = tiny.block(model, seed + 5, causal=causal, anchor_first=bool(seed))
        head.cfg = replace(head.cfg, windows=WINDOWS[kind])
        assert check(model, head, seed, 20, 5, new_tokens=24) > 5


def test_windows_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a window gets lost on its way to the kernel, which reads masks as bits: here its twin does."""
    model = tiny.target()
    head = tiny.block(model)
    head.cfg = replace(head.cfg, windows=(4, None))
    monkeypatch.setattr(block, "tree_mask", lambda base, bits, width, window: TreeMask(base, bits, window))
    assert check(model, head, 0, 20, 5, new_tokens=24) > 5


@pytest.mark.slow
@pytest.mark.parametrize("anchor_first", [True, False])
def test_long_blocks(anchor_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a head with more levels than are drafted runs rows in vain or reads other rows, or if one whose rows see
    later rows is run with fewer."""
    monkeypatch.setattr(block, "MAX_LEVELS", 3)
    for seed, causal in itertools.product(range(2), (True, False)):
        model = tiny.target(seed)
        head = tiny.block(model, anchor_first=anchor_first, causal=causal)
        assert check(model, head, seed, 16, 4) > 5
        assert len(Block(head, model).mask_tokens) + 1 == ((3 if anchor_first else 4) if causal else 6)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("markov", [None, "vanilla"])
def test_text(temperature: float, lookup: bool, markov: str | None) -> None:
    """Fails if the text is not plain decoding's, whatever is drafted."""
    for seed in range(3):
        model = tiny.target(seed, torch.float32)
        head = tiny.block(model, seed, markov=markov)
        sampling, ids = Sampling(temperature, seed=seed), tiny.prompt(seed, 40)
        retrieval = Retrieval(9, "longest", torch.device("cpu")) if lookup else None
        engine = Engine(model, Block(head, model, 30, 4, retrieval), 128)
        text = sum(engine.generate(ids, 50, sampling), [])
        assert text == sum(Engine(model, Vanilla(), 128).generate(ids, 50, sampling), [])


@pytest.mark.slow
def test_context() -> None:
    """Fails if what is remembered of a text that was drafted and verified is not what a prefill of the same text
    leaves, or if a draft's own keys and values stay."""
    for seed in range(4):
        model, ids = tiny.target(seed), tiny.prompt(seed, 9)
        heads = [tiny.block(model, seed) for _ in range(2)]
        text = ids + sum(Engine(model, Block(heads[0], model, 30), 96).generate(ids, 30), [])
        engine = Engine(model, Block(heads[1], model, 30), 96)
        engine.prefill(text[:-1], 1, Sampling())
        place = len(text) - 20  # the last cycle's tokens are remembered in the next cycle
        assert (heads[0].kv[..., :place, :] - heads[1].kv[..., :place, :]).abs().max() < 1e-12
        assert heads[0].kv[..., :place, :].abs().min(-1).values.min() > 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, *MODES])
def test_quantized(mode: str | None) -> None:
    """Fails if the keys' and values' rows of a quantised head lose their scales: its trees would be others than those
    that its own layers give."""
    model = tiny.target(2, torch.float32, hidden_size=256, intermediate_size=256, num_attention_heads=4)
    head = tiny.block(model, 4, intermediate_size=256)
    if mode:
        head.quantize(mode)
    drafter = Block(head, model, 16)
    drafter.allocate(64)
    hidden, slots = torch.randn(5, 3 * 256), torch.arange(5)
    drafter.bound.add_context(hidden, slots)
    for i, layer in enumerate(head.layers):
        rows = layer.num_kv_heads * layer.head_dim
        made = layer.wqkv(head.hidden_norm(head.fc(hidden)))[:, -2 * rows:]
        k, v = made.unflatten(1, (2, -1, layer.head_dim)).unbind(1)
        stored = head.kv[i, :, 0, :, :5].transpose(1, 2)  # [2, 5, K, D]
        assert (stored[1] - v).abs().max() < 1e-4 * v.abs().max()
        assert (stored[0, 0] - layer.k_norm(k[0])).abs().max() < 1e-4  # slot 0 is rotated by 0


HEADS_OF_ALL = block_published.names_of(block_published.HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_but(4, block_published.HEADS), ids=HEADS_OF_ALL)
def test_published_heads(case: tuple[str, dict], tmp_path: Path) -> None:
    """Fails if a publisher's layout is read as another head than the one that was written: its trees would be others
    than the plain builder's. BLOCK_SEEDS=25 tries more than 200 contexts of each."""
    publisher, flags = case
    cycles = 0
    for seed in range(int(os.environ.get("BLOCK_SEEDS", "1"))):
        model = tiny.target(seed, torch.float32, num_hidden_layers=8)
        expected = block_published.write(tmp_path / str(seed), publisher, model.cfg, seed, **flags | {"measured": True})
        head = load_head(tmp_path / str(seed), model)
        plain = PlainBlock(expected.tensors, expected.config, expected.ids, model)
        new_tokens = 14 + (flags.get("window") or 0)  # the text outgrows the window
        cycles += check(model, head, seed, 20, 4, 1e-3, plain, new_tokens)
    assert cycles > 5


def test_copies_are_dropped(tmp_path: Path) -> None:
    """Fails if a copy of the target's embedding or lm_head is kept, which takes as much memory again, or if a head
    loses an embedding or lm_head that is not a copy."""
    model = tiny.target(1, torch.float32, num_hidden_layers=8)
    own = {"embed.weight": model.embed.weight, "lm_head.weight": model.lm_head.weight}
    for name in own:
        block_published.write(tmp_path / name, "deepspec", model.cfg, copies={name: own[name].detach()}, measured=True)
        head = load_head(tmp_path / name, model)
        assert (head.embed is None) == (name == "embed.weight") and (head.lm_head is None) == (name == "lm_head.weight")


# ----- The grid ----------------------------------------------------------------------------------------------------


def plain_grid(logits: Tensor, n: int, k: int) -> list[tuple[int, float, int]]:
    """(token, score, depth) of the n best nodes by a heap, in the order of a tree."""
    log_p = logits.double().log_softmax(-1)
    rankings = [[(int(i), float(p)) for p, i in zip(*row.topk(k))] for row in log_p]
    return [(node.token, node.score, node.depth) for node in best_paths(rankings, n, k).nodes]


@pytest.mark.slow
def test_grid() -> None:
    """Fails if the tree is not the n most probable paths, on 2,000 random cases, or if a parent is left out."""
    random = torch.Generator().manual_seed(1)
    for case in range(2000):
        n, k, depths = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 64), (1, 11), (1, 9)))
        n = min(n, sum(min(k**d, 64) for d in range(1, depths + 1)))
        logits = torch.randn(depths, 30, generator=random) * float(torch.rand((), generator=random) * 6)
        candidates = empty_candidates(depths * n, torch.device("cpu"))
        grid(logits, candidates, n, k)
        state = State(torch.tensor([5]), torch.tensor(1), None, torch.tensor(1), None, 64)
        tree = rerank(state, candidates, n, depths)
        expected = plain_grid(logits, n, k)
        assert tree.tokens[1:].tolist() == [token for token, _, _ in expected], case
        assert tree.depth[1:].tolist() == [depth for _, _, depth in expected], case


@pytest.mark.slow
def test_grid_ties() -> None:
    """Fails if equal scores break the tree: of ties any choice is as good, but parents must be kept, siblings differ,
    and the sum of probabilities must be the best one."""
    random = torch.Generator().manual_seed(2)
    for _ in range(500):
        n, k, depths = (int(torch.randint(low, high, (), generator=random)) for low, high in ((1, 64), (1, 11), (2, 8)))
        n = min(n, sum(min(k**d, 64) for d in range(1, depths + 1)))
        logits = torch.randint(0, 3, (depths, 20), generator=random).float()
        candidates = empty_candidates(depths * n, torch.device("cpu"))
        grid(logits, candidates, n, k)
        state = State(torch.tensor([5]), torch.tensor(1), None, torch.tensor(1), None, 64)
        tree = rerank(state, candidates, n, depths)
        paths = set()
        total = 0.0
        log_p = logits.double().log_softmax(-1)
        for node in range(1, n + 1):
            path, at = (), node
            while at:
                path, at = (int(tree.tokens[at]), *path), int(tree.parents[at])
            assert len(path) == tree.depth[node], "an ancestor is missing"
            paths.add(path)
            total += float(sum(log_p[d, token] for d, token in enumerate(path)).exp())
        assert len(paths) == n
        assert total == pytest.approx(sum(torch.tensor(s).exp().item() for _, s, _ in plain_grid(logits, n, k)), 1e-4)


def test_listed_tokens(tmp_path: Path) -> None:
    """Fails if a list in draft_vocab.json cuts the lm_head's rows and not those of a Markov head."""
    model = tiny.target(2, torch.float32)
    folder = tiny.save_block(tiny.block(model, markov="vanilla"), tmp_path / "head")
    (folder / "draft_vocab.json").write_text(json.dumps(UNSORTED))
    head = load_head(folder, model)
    plain = PlainBlock(head.state_dict(), head.cfg, head.vocab, model)
    plain.w["markov.w2.weight"] = plain.w["markov.w2.weight"][head.vocab]
    assert len(head.vocab) == len(UNSORTED) and check(model, head, 1, 16, 4, 1e-3, plain) > 5


def test_refused() -> None:
    """Fails if a tree that the head cannot draft is taken."""
    model = tiny.target()
    head = tiny.block(model)
    for wrong in ({"draft_tokens": 1}, {"draft_tokens": 129}, {"topk": 0}, {"topk": 11}):
        with pytest.raises(ValueError, match="2-128 --draft_tokens and 1-10 --draft_topk"):
            Block(head, model, **wrong)


def test_a_chain_longer_than_the_block() -> None:
    """Fails if the nodes of a retrieved chain do not know their depth beyond the block's, or get scores of others."""
    model = tiny.target(1)
    drafter = Block(tiny.block(model, 1, block_size=3), model, 16, 2, Retrieval(9, "longest", torch.device("cpu")))
    state = Engine(model, drafter, 128).prefill([*range(12)] * 3 + [*range(3)], 20, Sampling())
    state.tokens[int(state.length) - 1] = 3  # the text goes on as it began
    with torch.inference_mode():
        tree = drafter.propose(state)
        tokens, scores = torch.empty(10, dtype=torch.int64), torch.empty(9)
        drafter.retrieval.write(state, tokens, scores)
    assert tree.depth.max() == 9 and torch.equal(drafter.candidates.scores[-9:], scores)


def test_not_too_many_candidates() -> None:
    """Fails if a Markov head with many levels grows more candidates than MAX_CANDIDATES."""
    model = tiny.target(1)
    made = Block(tiny.block(model, markov="vanilla", block_size=16), model, 60, 10)
    assert made.topk == 8 and len(made.candidates.tokens) <= block.MAX_CANDIDATES
