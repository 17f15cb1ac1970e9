"""drafters/tree_size.py: the curve against trees that are really drafted, the choice, the times, and their cache."""
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from helpers import operations

from draft import Eagle2, Vanilla
from drafters import tree_size
from drafters.heads import load_head
from drafters.tree_size import (
    LEVELS,
    NODES,
    TOPK,
    best_size,
    cached_profile,
    fastest_tree,
    measure,
    profile_key,
    read_curve,
    tokens_by_size,
)
from engine import Engine
from formats.eagle import CURVE, VOCAB
from ops import graphs
from sampling import Sampling
from training import evaluation
from tree import Candidates

FLAT = [[3.0] * LEVELS] * len(NODES)  # no tree gains more than another


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's file, in a folder that does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    return tmp_path / "home/cache/eagle2/trees.json"


@pytest.mark.slow
@pytest.mark.parametrize("seed, noise, vocab, stop", [(0, 0.1, 0, 0), (3, 0.3, 0, 20), (5, 0.1, 12, 0), (7, 0.5, 0, 0)])
def test_curve_is_what_trees_gain(seed: int, noise: float, vocab: int, stop: int, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the curve counts a node that a smaller tree drops, misses one that fewer levels leave room for, or
    forgets the bonus token or the end of the text. A tree of each size is drafted from the same texts, and must commit
    as many tokens as the curve says."""
    model, head = tiny.pair(seed, noise)
    folder = tiny.save_head(head, tmp_path / "head")
    ids = tiny.prompt(seed, 9)
    counts = []
    if vocab:
        (folder / VOCAB).write_text(json.dumps(list(range(vocab))))
    text = ids + sum(Engine(model, Vanilla(), 64).generate(ids, 26), [])
    stops = frozenset(text[len(ids) + stop:len(ids) + stop + 1] if stop else [])
    text = ids + sum(Engine(model, Vanilla(), 64, stops).generate(ids, 26), [])
    original = tree_size.tokens_by_size
    monkeypatch.setattr(evaluation, "tokens_by_size", lambda candidates, rest: counts.append(
        (text[:-len(rest)], original(candidates, rest))) or counts[-1][1])
    evaluation.save_curve(model, folder, [ids], stops, 26)
    assert counts[0][0] == text[:len(ids) + 1]
    curve, head = read_curve(folder), load_head(folder, model)
    totals = torch.zeros(len(NODES), LEVELS)
    for levels in range(1, LEVELS + 1):
        drafter = Eagle2(head, model, NODES[-1], levels, TOPK)
        sizes = [Eagle2(head, model, nodes, levels, TOPK).num_nodes for nodes in NODES]
        engine = Engine(model, drafter, 64, stops)
        for before, gains in counts:
            state = engine.prefill(before[:-1], len(text) - len(before) + 1, Sampling())
            assert state.tokens[:int(state.length)].tolist() == before
            drafter.num_nodes = sizes[-1]
            with torch.inference_mode():
                drafter.propose(state)  # once for all sizes: the levels decide what is drafted, the nodes what is kept
                began = state.length.clone(), state.committed.clone(), state.done.clone()
                for i, drafter.num_nodes in enumerate(sizes):
                    for value, was in zip((state.length, state.committed, state.done), began):
                        value.copy_(was)
                    tree = drafter.rerank(state)
                    assert len(tree.tokens) == sizes[i]
                    engine.commit(state.length - 1, tree, *engine.verify(state.length - 1, tree))
                    gain = int(state.length) - len(before)
                    assert gain == gains[i, levels - 1], (len(before), sizes[i], levels)
                    totals[i, levels - 1] += gain
    assert [[round(x / len(counts), 3) for x in row] for row in totals.tolist()] == curve
    assert len({x for row in curve for x in row}) > 5 or vocab, "trees of all sizes commit the same"


def test_choice() -> None:
    """Fails if nodes or levels have the wrong index, ms are taken for seconds, a level counts twice, or the most tokens
    per step are taken for the best. Every size must be chosen where it alone gains."""
    rising = [[1 + 0.5 * i + 0.1 * j for j in range(LEVELS)] for i in range(len(NODES))]
    free, dear = [0.01] * len(NODES), [float(nodes) for nodes in NODES]
    assert best_size([0.01, 0.0001, 0.01, *free], rising)[:2] == (128, LEVELS)
    assert best_size([0.01, 0.0001, 0.01, *dear], rising)[:2] == (8, LEVELS)
    assert best_size([0.01, 5.0, 0.01, *free], rising)[:2] == (128, 1)
    assert best_size([0.01, 5.0, 0.01, *dear], rising)[:2] == (8, 1)
    assert best_size([1.0, 1.0, 1.0, *[1.0] * len(NODES)], FLAT)[:2] == (8, 1), "larger than needed"
    assert best_size([100.0, 15.0, 100.0, *dear], rising)[:2] == (128, 1), "the rest counts"
    for i, nodes in enumerate(NODES):
        for j in range(LEVELS):
            curve = [[4.0 if (a, b) == (i, j) else 1.0 for b in range(LEVELS)] for a in range(len(NODES))]
            assert best_size([2.0, 0.1, 1.0, *[4.0] * len(NODES)], curve)[:2] == (nodes, j + 1)
    # 2 + 3 * 1 + 10 + 5 = 20 ms for 4 tokens of 32 nodes and 4 levels
    curve = [[1.0] * LEVELS for _ in NODES]
    curve[3][3] = 4.0
    nodes, levels, table = best_size([2.0, 1.0, 5.0, *[10.0] * len(NODES)], curve)
    lines = table.splitlines()
    assert (nodes, levels) == (32, 4) and table.count("*") == 1 and max(map(len, lines)) <= 100
    assert lines[6].split() == ["32", "10.000", "58.8", "55.6", "52.6", "*200.0", "47.6", "45.5", "43.5", "41.7",
                                "40.0", "38.5"]
    assert "2.000 ms" in lines[0] and "one 1.000" in lines[0] and "5.000" in lines[0]


@pytest.mark.slow
def test_profile_is_of_a_cycle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a part of the cycle is forgotten or counted twice, the engine still decodes, or another engine's text
    changes. It counts operations instead of milliseconds. Their sum is a cycle's, less the one that computes the root's
    slot."""
    model, head = tiny.pair()
    engine = Engine(model, Eagle2(head, model, NODES[-1], LEVELS, TOPK), 700)
    text = sum(engine.generate([1, 2, 3], 20), [])
    still = operations(engine.cycle)
    monkeypatch.setattr(graphs, "elapsed", operations)
    first, further, rest, *verify = measure(model, head, 700)
    assert first + (LEVELS - 1) * further + rest + verify[-1] == still - 1 and len(set(verify)) == 1
    assert min(first, further, rest) > 0 and sum(engine.generate([1, 2, 3], 20), []) == text
    seen, original = [], tree_size.verify_by_rows
    monkeypatch.setattr(tree_size, "verify_by_rows", lambda engine, rows, timer: seen.append(
        (int(engine.state.length), engine.state.width)) or original(engine, rows, timer))
    for slots in (2, 300, 2000):  # also contexts with less room than 512 tokens
        assert len(measure(*tiny.pair(), slots)) == 3 + len(NODES)
    assert seen[::2] == seen[1::2] == [(2, 130), (300, 428), (512, 640)], "slots that such a text reads"


@pytest.mark.slow
def test_too_slow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, cache: Path) -> None:
    """Fails if measuring goes on for minutes, the user is not told why the default tree is used, or an empty profile is
    kept in the cache."""
    seen = []
    monkeypatch.setattr(tree_size, "verify_by_rows", lambda engine, rows, timer: seen.append(rows) or {8: 251.0})
    assert fastest_tree(*tiny.pair(), FLAT, 64, "key") is None and seen == [(8,)] and not cache.exists()
    assert capsys.readouterr().err.count("\n") == 1


def test_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Fails if a profile is measured each time, another key's is used, or a damaged file ends the program or stays."""
    calls, profile = [], [float(i) for i in range(1, 4 + len(NODES))]
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: calls.append(inputs) or profile)
    model, head = tiny.pair()
    for _ in range(2):
        assert fastest_tree(model, head, FLAT, 64, "a") == (8, 1, TOPK) and len(calls) == 1
    assert cached_profile("b", model, head, 64) == profile and len(calls) == 2
    assert json.loads(cache.read_text()) == {"a": profile, "b": profile}
    assert os.listdir(cache.parent) == ["trees.json"] and capsys.readouterr().err == ""
    assert fastest_tree(model, head, FLAT, 64, show=True) == (8, 1, TOPK) and len(calls) == 3, "no key, no cache"
    assert "verify, ms" in capsys.readouterr().err
    assert fastest_tree(model, head, FLAT[:6], 64, "a") == (8, 1, TOPK)
    assert len(calls) == 4 and calls[-1][-1] == NODES[:6], "a curve that ends at 60 nodes: larger are not measured"
    bad = [profile[1:], [*profile[1:], float("nan")], [*profile[1:], 0.0], [*profile[1:], "1"], "12345678901", None,
           {"a": 1}]
    for damaged in [b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000,
                    *(json.dumps({"a": x}).encode() for x in bad)]:
        cache.write_bytes(damaged)
        before = len(calls)
        for _ in range(2):
            assert cached_profile("a", model, head, 64) == profile
        assert len(calls) == before + 1


def test_no_place_for_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a home that is read-only, or is no folder, ends the program."""
    profile = [1.0] * (3 + len(NODES))
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: profile)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached_profile("a", *tiny.pair(), 64) == profile
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # counts as not set
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_profile("a", *tiny.pair(), 64) == profile and (tmp_path / "home/.cache/eagle2/trees.json").is_file()


def test_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the times of another model, head, device or version have the same key."""
    model, head = tiny.pair()
    file, folder = tiny.save_target(model, tmp_path / "m"), tiny.save_head(head, tmp_path / "h")

    def key(*settings: object, paths: tuple = (file, folder)) -> str:
        return profile_key(model, head, paths, *settings)
    keys = [key(None, None)]
    assert key(None, None) == keys[0] == key(None, None, paths=(file / "model.safetensors", folder))
    (folder / CURVE).write_text("{}")
    assert key(None, None) == keys[0], "the curve is no part of the key: it is read each time"
    keys += [key("int8", None), key("int4", 64), key(None, None, paths=(file, file))]
    for path in (file, folder):
        stat = (path / "model.safetensors").stat()
        os.utime(path / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        keys.append(key(None, None))
    head.vocab = torch.arange(12)
    keys.append(key(None, None))
    head.quantize("int8")
    keys.append(key(None, None))
    model.embed.weight.data = model.embed.weight.data.float()
    keys.append(key(None, None))
    monkeypatch.setattr(tree_size, "device_name", lambda device: "another")
    keys.append(key(None, None))
    monkeypatch.setattr(torch, "__version__", "9.9")
    keys.append(key(None, None))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("asked", [0, 2])
def test_no_curve_of_nothing(asked: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Fails if a curve that was measured on no cycle is written: the engine would choose its trees by it."""
    model, head = tiny.pair(1, 0.1)
    folder = tiny.save_head(head, tmp_path / "head")
    prompts = [tiny.prompt(seed, 9) for seed in range(asked)]  # every answer ends with its first token
    evaluation.save_curve(model, folder, prompts, frozenset(range(model.cfg.vocab_size)), 26)
    assert not (folder / CURVE).exists() and f"{CURVE} is not written" in capsys.readouterr().err


def test_curve_is_refused(tmp_path: Path) -> None:
    """Fails if a curve of other trees, half a curve, or numbers that no tree can reach are accepted, or if the command
    that measures one is not of this head, whatever its kind."""
    with pytest.raises(FileNotFoundError, match="acceptance.json: not there") as error:
        read_curve(tmp_path / "a head")
    assert f"--steps 0 --tokens 0 --generate_batch 128 --out '{tmp_path}/a head'` measures it" in str(error.value)
    sound = {"nodes": list(NODES), "topk": TOPK, "gained": FLAT}
    (tmp_path / CURVE).write_text(json.dumps(sound))
    assert read_curve(tmp_path) == FLAT
    rising = [[1.0 + i + j for j in range(8)] for i in range(6)]  # of a version with 60 nodes and 8 levels at most
    (tmp_path / CURVE).write_text(json.dumps(sound | {"nodes": NODES[:6], "gained": rising}))
    assert read_curve(tmp_path) == [row + 2 * row[-1:] for row in rising]
    for wrong in ({"nodes": [8, 16]}, {"topk": 8}, {"gained": FLAT[1:]}, {"gained": []}, {"gained": [[3.0] * 11] * 8},
                  {"gained": 3}, {"gained": [[3.0] * 7, *FLAT[1:]]}, {"gained": [[]] * 8}, {"gained": [[0.0] * 8] * 8},
                  {"gained": [["3"] * 8] * 8}, {"gained": [[float("nan")] * 8] * 8}):
        (tmp_path / CURVE).write_text(json.dumps(sound | wrong))
        with pytest.raises(ValueError, match="acceptance.json: damaged"):
            read_curve(tmp_path)
    for text in ("", "[1, 2", "[]", "null", json.dumps({"nodes": list(NODES)}),
                 json.dumps(sound | {"nodes": [], "gained": []})):
        (tmp_path / CURVE).write_text(text)
        with pytest.raises(ValueError, match="acceptance.json: damaged"):
            read_curve(tmp_path)


@pytest.mark.slow
def test_shipped_curve() -> None:
    """Fails if the demo head has no curve, or its curve falls where the tree grows."""
    curve = read_curve(ROOT / "heads/SmolLM2-135M-Instruct")
    for i in range(len(curve)):
        assert curve[i] == sorted(curve[i]) and [row[i] for row in curve] == sorted(row[i] for row in curve)
    assert 1.5 < curve[0][0] < 2 and 3 < curve[-1][-1] < LEVELS + 1


def test_cache_of_a_block_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a block head, whose further levels take no time, is measured again at each start."""
    calls, profile = [], [1.0, 0.0, 1.0, *[2.0] * len(NODES)]
    monkeypatch.setattr(tree_size, "measure", lambda *inputs: calls.append(inputs) or profile)
    for _ in range(2):
        assert cached_profile("a", *tiny.pair(), 64) == profile and len(calls) == 1


def test_curve_of_a_deep_block() -> None:
    """Fails if the last column of a curve leaves out the levels that a block head has beyond LEVELS."""
    chain = Candidates(torch.arange(12), -torch.arange(12.0), torch.arange(12) - 1)
    assert tokens_by_size(chain, [*range(12), 20])[-1].tolist() == [*range(2, LEVELS + 1), 13]
