"""draft.py against a plain builder: a head that is run row by row, trees that are Python lists.

The engine writes the right text with any tree. So only these tests, and those of acceptance, notice a drafter that
reads the wrong position, feature or cache slot.
"""
import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from conftest import DEMO_TREE, all_cores
from helpers import Payload, slow_but
from plain_trees import Builder, PlainHead, check_cycles
from recorder import Recorder
from safetensors.torch import load_file, save_file
from torch import Tensor

from draft import Eagle2, EagleHead, Vanilla
from drafters.eagle1 import EAGLE1_TREE, Eagle1
from drafters.heads import load_head
from engine import Engine
from formats.config import Config
from formats.eagle import VOCAB, find_head
from model import Llama
from sampling import Sampling

# ----- Trees -----------------------------------------------------------------------------------------------------

SHAPES = [(2, 1, 1), (2, 8, 10), (4, 3, 1), (9, 8, 1), (6, 5, 2), (64, 6, 2), (20, 4, 3), (64, 1, 10), (11, 1, 10),
          (60, 6, 10), (128, 10, 10), (33, 2, 7), (64, 8, 4), (17, 5, 9)]
HEADS = [{}, {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 20},
         {"fc_bias": True, "qkv_bias": True}, {"head_dim": 12, "rope_theta": 500.0, "rms_norm_eps": 1e-2}]


def tiny_run(drafter: Eagle1 | Eagle2, model: Llama, seed: int) -> tuple[Recorder, Builder]:
    recorder = Recorder(drafter)
    ids, sampling = tiny.prompt(seed, 3 + seed % 5), Sampling(temperature=float(seed % 2), seed=seed)
    text = ids + sum(Engine(model, drafter, 96).generate(ids, 11, sampling), [])
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
    """Fails if the head in heads/ drafts another tree, in fp32, at any of 100 positions of eight texts."""
    total = close = 0
    with all_cores():
        for _, text, recorder in demo_runs:
            builder = Builder(plain_demo_head, text, tiny.features(demo_model, text))
            found = check_cycles(recorder, builder, lambda length, b=builder: b.eagle2(length, *DEMO_TREE), 2e-3)
            total, close = total + found[0], close + found[1]
    assert total >= 90
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


@pytest.mark.parametrize("shape", [(1, 6, 10), (129, 6, 10), (60, 0, 10), (60, 11, 10), (60, 6, 0), (60, 6, 11)])
def test_impossible_shapes(shape: tuple[int, int, int]) -> None:
    """Fails if a tree is accepted that overflows the 128 bits of a node's ancestors or the spare cache slots."""
    model = tiny.target()
    with pytest.raises(ValueError, match="draft_tokens"):
        Eagle2(tiny.head(model), model, *shape)


# ----- Some tokens only -------------------------------------------------------------------------------------------


@pytest.mark.slow
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
            impossible, read = torch.full((24,), -1e9).index_fill(0, vocab, 0), drafter.bound.read_logits

            def read_fewer(*args, read=read, impossible=impossible):
                logits, taken = read(*args)
                return logits + impossible, taken

            drafter.bound.read_logits = read_fewer
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
    rows = torch.stack(Builder(plain, [0, *tokens], features).outputs)
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
    ("EAGLE-3", "under another name too"), ("no fc", "fc.weight"), ("no k", "k_proj"), ("k of another width", "k_proj"),
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
