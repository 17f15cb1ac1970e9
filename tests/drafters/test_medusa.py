"""drafters/medusa.py against the formula, and against a twin in plain Python that walks the published tree.

The engine writes the right text with any tree. So only the twin shows that a head reads the wrong feature, that ranks
or levels are mixed up, or that noise is of another position.
"""
import json
import pickle
from pathlib import Path

import pytest
import tiny
import torch
from helpers import GREEDY, SAMPLINGS, Payload, cycle_by_cycle, vanilla, write
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.medusa import MEDUSA_TREE, Medusa, MedusaHeads, load_medusa, save_medusa
from engine import Engine
from model import Llama
from quant.linear import quantize_linears
from sampling import Sampling, gumbel_noise
from tree import State, Tree

# The tree as the authors list it. Their heads, and those of most comparisons, are run with it
PUBLISHED_TREE = [
    [0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4], [0, 4], [2, 0], [0, 5], [0, 0, 1], [5],
    [0, 6], [6], [0, 7], [0, 1, 0], [1, 1], [7], [0, 8], [0, 0, 2], [3, 0], [0, 9], [8], [9], [1, 0, 0], [0, 2, 0],
    [1, 2], [0, 0, 3], [4, 0], [2, 1], [0, 0, 4], [0, 0, 5], [0, 0, 0, 0], [0, 1, 1], [0, 0, 6], [0, 3, 0], [5, 0],
    [1, 3], [0, 0, 7], [0, 0, 8], [0, 0, 9], [6, 0], [0, 4, 0], [1, 4], [7, 0], [0, 1, 2], [2, 0, 0], [3, 1], [2, 2],
    [8, 0], [0, 5, 0], [1, 5], [1, 0, 1], [0, 2, 1], [9, 0], [0, 6, 0], [0, 0, 0, 1], [1, 6], [0, 7, 0]]


def published(count: int, layers: int = 1, own: bool = True, seed: int = 0, size: int = 32, vocab_size: int = 24
              ) -> dict[str, Tensor]:
    """Tensors under the authors' names, of heads that all guess different tokens."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64) / shape[-1] ** 0.5

    tensors = {}
    for head in range(count):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = 2 * draw(size, size)
            tensors[f"{head}.{layer}.linear.bias"] = draw(size)
        if own:
            tensors[f"{head}.{layers}.weight"] = 2 * draw(vocab_size, size)
    return tensors


def formula(tensors: dict[str, Tensor], model: Llama, head: int, feature: Tensor) -> Tensor:
    """The logits [V] of one head, from the authors' names and one feature [C]."""
    layer = 0
    while f"{head}.{layer}.linear.weight" in tensors:
        z = tensors[f"{head}.{layer}.linear.weight"] @ feature + tensors[f"{head}.{layer}.linear.bias"]
        feature, layer = feature + z * torch.sigmoid(z), layer + 1
    return tensors.get(f"{head}.{layer}.weight", model.lm_head.weight) @ feature


def heads_of(tensors: dict[str, Tensor], model: Llama, folder: Path) -> MedusaHeads:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    return load_medusa(folder, model)


def state_of(feature: Tensor) -> State:
    """A state of which `Medusa` must read the second of three features, `feature`."""
    zero = torch.zeros((), dtype=torch.int64)
    features = torch.stack((torch.ones_like(feature), feature, -feature))
    return State(torch.tensor([5, 7, 0, 0]), zero + 2, features, zero + 2, zero == 1, 128)


# ----- Files -----------------------------------------------------------------------------------------------------


def vllm_names(tensors: dict[str, Tensor], layers: int, prefix: str = "") -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        head, layer, *rest = name.split(".")
        named[prefix + (f"lm_heads.{head}.weight" if int(layer) == layers else
                        f"blocks.{head}.layers.{layer}.{rest[-1]}")] = tensor
    return named


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layout", ["pt", "old pt", "TGI", "vLLM", "vLLM with a prefix", "saved again"])
def test_layouts(layout: str, own: bool, layers: int, tmp_path: Path) -> None:
    """Fails if heads or blocks are in another order, a block is left out, projections are mixed up or replaced by the
    lm_head, the config's number of heads is believed, or a head's tokens are put at another level."""
    model, tensors = tiny.target(), published(5, layers, own, seed=layers)
    path = tmp_path
    (tmp_path / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": 1}))
    if "pt" in layout:
        torch.save(tensors, tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=layout == "pt")
    elif "vLLM" in layout:
        prefix = "medusa_heads." if "prefix" in layout else ""
        save_file(vllm_names(tensors, layers, prefix) | {"token_map": torch.arange(24)}, tmp_path / "model.safetensors")
    else:
        path = tmp_path / "medusa_lm_head.safetensors"
        save_file(tensors, path)
    heads = load_medusa(path, model)
    if layout == "saved again":
        save_medusa(heads, tmp_path / "again")
        assert load_file(tmp_path / "again/medusa_lm_head.safetensors").keys() == tensors.keys()
        config = json.loads((tmp_path / "again/config.json").read_text())
        assert config == {"version": "1" if own else "2", "medusa_num_heads": 5, "medusa_num_layers": layers,
                          "base_model_name_or_path": ""}
        heads = load_medusa(tmp_path / "again", model)
    assert heads.weight.shape[:2] == (layers, 5) and (heads.projections is not None) == own
    for feature in torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64):
        drafter = Medusa(heads, model, [(0,) * depth for depth in range(1, 6)])
        expected = torch.stack([formula(tensors, model, head, feature) for head in range(5)])
        logits = drafter.logits(feature[None], state_of(feature))
        assert logits.dtype == torch.float32 and torch.allclose(logits.double(), expected, rtol=1e-5, atol=1e-5)
        tokens = drafter.propose(state_of(feature)).tokens.tolist()
        assert tokens == [7, *expected.argmax(-1).tolist()]


@pytest.mark.parametrize("config", [{"version": "2"}, {"version": 2}, {"original_lm_head": True}])
def test_shared_lm_head(config: dict, tmp_path: Path) -> None:
    """Fails if projections are used although the config says that they are not, or if projections of one head only are
    refused then."""
    model, tensors = tiny.target(), published(3)
    for alone in (False, True):
        if alone:
            del tensors["1.1.weight"], tensors["2.1.weight"]
        save_file(vllm_names(tensors, 1), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert load_medusa(tmp_path, model).projections is None
        (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="1 tensors of projections"):
        load_medusa(tmp_path, model)


def test_without_bias(tmp_path: Path) -> None:
    """Fails if heads without biases, as vLLM's may be, are refused, or get other biases than zeros."""
    model, tensors = tiny.target(), published(2)
    bare = {name: t for name, t in tensors.items() if "bias" not in name}
    heads, feature = heads_of(bare, model, tmp_path), torch.randn(32, dtype=torch.float64)
    zeros = {name: t if "bias" not in name else 0 * t for name, t in tensors.items()}
    logits = Medusa(heads, model).logits(feature[None], state_of(feature))
    for head in range(2):
        assert torch.allclose(logits[head].double(), formula(zeros, model, head, feature), atol=1e-5)


def test_dtype_and_order_of_files(tmp_path: Path) -> None:
    """Fails if weights stay in the file's half precision with a target in fp32, or a model file is read instead of the
    heads."""
    model, tensors = tiny.target(dtype=torch.float32), published(2)
    torch.save({name: t.bfloat16() for name, t in tensors.items()}, tmp_path / "medusa_lm_head.pt")
    tiny.save_target(model, tmp_path)
    heads = load_medusa(tmp_path, model)
    assert {p.dtype for p in heads.parameters()} == {torch.float32}
    assert torch.equal(heads.weight[0, 1], tensors["1.0.linear.weight"].bfloat16().float())


def rewrite(folder: Path, how: str) -> None:
    file, config = folder / "medusa_lm_head.safetensors", folder / "config.json"
    tensors, data, binary = load_file(file), file.read_bytes(), folder / "medusa_lm_head.pt"
    noise = bytes(range(120))
    changed = {
        "EAGLE": {"fc.weight": torch.zeros(32, 64)}, "nothing": {},
        "no bias of one": {name: t for name, t in tensors.items() if name != "1.0.linear.bias"},
        "a head missing": {name: t for name, t in tensors.items() if not name.startswith("1.")},
        "a projection missing": {name: t for name, t in tensors.items() if name != "2.1.weight"},
        "projections alone": {name: t for name, t in tensors.items() if "linear" not in name},
        "a block missing": {name.replace(".1.weight", ".2.weight"): t for name, t in tensors.items()},
        "head 1000": tensors | {"1000.0.linear.weight": torch.zeros(32, 32)},
        "head 999": tensors | {"999.0.linear.weight": torch.zeros(32, 32)},
        "twice": tensors | {"medusa_heads.1.0.linear.weight": torch.zeros(32, 32)},
        "other hidden": published(3, size=64), "other vocabulary": published(3, vocab_size=25),
        "integers": tensors | {"0.1.weight": torch.zeros(24, 32, dtype=torch.int8)},
        "a scale": tensors | {"0.1.weight_scale": torch.zeros(24)},
    }
    if how in changed:
        save_file(changed[how], file)
    elif how == "truncated":
        file.write_bytes(data[:-10])
    elif "config" in how:
        config.write_text({"half a config": '{"version": ', "config a list": "[2]", "deep config": "[" * 10**5}[how])
    else:
        file.unlink()
        torch.save(tensors, binary)
        whole = binary.read_bytes()
        {"no file": binary.unlink,
         "payload": lambda: binary.write_bytes(pickle.dumps({"0.1.weight": Payload(folder / "executed")})),
         "zipped payload": lambda: torch.save({"0.1.weight": Payload(folder / "executed")}, binary),
         "a list": lambda: torch.save(list(tensors.values()), binary),
         "not tensors": lambda: torch.save({name: 1 for name in tensors}, binary),
         "numbers for names": lambda: torch.save(dict(enumerate(tensors.values())), binary),
         "truncated pt": lambda: binary.write_bytes(whole[:-200]), "empty pt": lambda: binary.write_bytes(b""),
         "flipped pt": lambda: binary.write_bytes(whole[:80] + noise + whole[200:]),
         "text pt": lambda: binary.write_text("<html>404: not found</html>")}[how]()


@pytest.mark.parametrize("how, message", [
    ("EAGLE", "fc.weight is no part"), ("nothing", "holds no"), ("no bias of one", "2 tensors of bias"),
    ("a head missing", "2 tensors of weight"), ("a projection missing", "2 tensors of projections"),
    ("projections alone", "holds no"), ("a block missing", "follow 2 blocks"), ("head 1000", "1000.0.linear.weight"),
    ("head 999", "4 tensors of weight"), ("twice", "another name"), ("other hidden", "another model"),
    ("other vocabulary", "another model"), ("integers", "int8"), ("a scale", "weight_scale"), ("truncated", "damaged"),
    ("half a config", "config.json"), ("config a list", "config.json"), ("deep config", "config.json"),
    ("no file", "no Medusa heads there"), ("payload", "damaged"), ("zipped payload", "damaged"),
    ("a list", "not a dictionary"), ("not tensors", "not a dictionary"), ("numbers for names", "0 is no part"),
    ("truncated pt", "damaged"), ("empty pt", "damaged"), ("flipped pt", "damaged"), ("text pt", "damaged")])
def test_refused(how: str, message: str, tmp_path: Path) -> None:
    """Fails if damaged heads, or those of another model or kind, load and draft nonsense; if the error is no single
    line; or if a pickle runs code."""
    folder, target = tmp_path / "medusa", tiny.target()
    heads_of(published(3), target, folder)
    rewrite(folder, how)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_medusa(folder, target)
    text = str(error.value)
    assert message in text and str(folder) in text and "\n" not in text and len(text) < 300
    assert not (folder / "executed").exists()


def test_refused_file_and_model(tmp_path: Path) -> None:
    """Fails if a path to a missing file, or a checkpoint, is accepted as heads."""
    model = tiny.target()
    with pytest.raises(FileNotFoundError, match="no Medusa heads there"):
        load_medusa(tmp_path / "medusa_lm_head.pt", model)
    with pytest.raises(ValueError, match="holds a whole model"):
        load_medusa(tiny.save_target(model, tmp_path), model)


# ----- The tree --------------------------------------------------------------------------------------------------


def test_published_tree() -> None:
    """Fails if a path is missing or not in the authors' tree, or a level has another size than in the paper's
    figures."""
    assert sorted(MEDUSA_TREE) == sorted(map(tuple, PUBLISHED_TREE)) and len(set(MEDUSA_TREE)) == 63
    assert [sum(len(path) == depth for path in MEDUSA_TREE) for depth in range(1, 6)] == [10, 28, 23, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_shape(count: int) -> None:
    """Fails if a child comes before its parent, a level has no head, or max_depth is not the depth of the tree."""
    model = tiny.target()
    drafter = Medusa(MedusaHeads(32, count).double(), model)
    depth, parents = drafter.tree.depth.tolist(), drafter.tree.parents.tolist()
    assert drafter.num_nodes == len(parents) == [11, 39, 62, 64, 64][count - 1]
    assert drafter.max_depth == max(depth) == min(count, 4)
    assert parents[0] == 0 and all(parents[i] < i and depth[i] == depth[parents[i]] + 1 for i in range(1, len(parents)))


def test_impossible_trees() -> None:
    """Fails if a tree is accepted with more nodes than two int64 have bits, or more ranks than the GPU's kernel keeps
    or the vocabulary has."""
    heads, ranks = MedusaHeads(32, 3).double(), range(10)
    many = [(i,) for i in ranks] + [(i, j) for i in ranks for j in ranks] + [(0, i, j) for i in (0, 1) for j in ranks]
    for choices, size in ((many, 24), ([(10,)], 24), ([(9,)], 9)):
        with pytest.raises(ValueError, match="are possible"):
            Medusa(heads, tiny.target(vocab_size=size), choices)
    with pytest.raises(ValueError):
        Medusa(heads, tiny.target(), [(0,), (1, 0)])


class Watched(Medusa):
    """Records the state that it found and the tree that it proposed."""

    def propose(self, state: State) -> Tree:
        tree = super().propose(state)
        feature = state.hidden[int(state.committed) - 1].clone()
        self.seen = [*getattr(self, "seen", []), (int(state.length), feature, tree)]
        return tree


def twin(tensors: dict[str, Tensor], model: Llama, feature: Tensor, noise: Tensor) -> dict[tuple[int, ...], list[int]]:
    """For each path of the published tree, the tokens on it."""
    best = []
    for head in range(4):
        logits = (formula(tensors, model, head, feature).float() + noise[head]).tolist()
        best.append(sorted(range(len(logits)), key=lambda token, logits=logits: -logits[token]))
    return {tuple(path): [best[depth][rank] for depth, rank in enumerate(path)] for path in PUBLISHED_TREE}


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, seed=3)])
def test_tree_equals_twin(sampling: Sampling, own: bool, tmp_path: Path) -> None:
    """Fails if heads read another token's feature, in the first cycle or after several tokens were accepted; if ranks
    or levels are mixed up; or if noise is of another position."""
    model, tensors = tiny.target(3), published(5, own=own, seed=2)
    drafter = Watched(heads_of(tensors, model, tmp_path), model)
    ids = tiny.prompt(1, 9)
    cycles = cycle_by_cycle(Engine(model, drafter, 256), ids, 60, sampling)
    text, gains = ids + sum(cycles, []), [len(cycle) for cycle in cycles[1:]]
    assert max(gains) > 1 and len(drafter.seen) == len(gains)
    features = tiny.features(model, text)
    for length, feature, tree in drafter.seen:
        positions = torch.arange(length - 1, length + 4)  # of the root and the levels below it
        noise = sampling.temperature * gumbel_noise(torch.tensor(sampling.seed), positions, 24)
        assert torch.allclose(feature, features[length - 2], atol=1e-9)
        assert int((model.lm_head.weight @ feature + noise[0]).argmax()) == text[length - 1]
        found = {}
        for node in range(1, len(tree.tokens)):
            above = int(tree.parents[node])
            path = found.get(above, ())
            found[node] = (*path, int(tree.tokens[node]))
        expected = twin(tensors, model, features[length - 2], noise[1:])
        assert sorted(found.values()) == sorted(map(tuple, expected.values()))


# ----- The text, and what a cycle gains ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_equals_vanilla(seed: int, tmp_path: Path) -> None:
    """Fails if the text depends on the drafts: with 1 to 5 heads of 1 or 2 blocks, V1 and V2, greedy and sampled, with
    a stop id within an accepted path, and up to the last slot of the context."""
    model = tiny.target(seed, vocab_size=(12, 24, 60)[seed % 3])
    size, ids = model.cfg.vocab_size, tiny.prompt(seed, 1 + 2 * seed, model.cfg.vocab_size)
    heads = heads_of(published(1 + seed % 5, 1 + seed % 2, seed % 4 < 2, seed, vocab_size=size), model, tmp_path)
    for sampling in SAMPLINGS:
        text = vanilla(model, ids, 40, sampling)
        assert write(Engine(model, Medusa(heads, model), 256), ids, 40, sampling) == text
        stop_ids = frozenset([text[20]])
        expected = text[:text.index(text[20]) + 1]
        assert write(Engine(model, Medusa(heads, model), 256, stop_ids), ids, 40, sampling) == expected
        engine = Engine(model, Medusa(heads, model), len(ids) + 17)
        assert write(engine, ids, 40, sampling) == text[:17]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_equals_vanilla_in_fp32(mode: str | None, tmp_path: Path) -> None:
    """Fails if a tensor of the cycle has the wrong dtype, which the other tests, in float64, do not show; or if
    drafting cannot read a quantised lm_head."""
    model = tiny.target(1, torch.float32)
    if mode:
        quantize_linears(model, mode)
    for own in (True, False):
        heads = heads_of(published(4, own=own), model, tmp_path / str(own))
        for sampling in SAMPLINGS[:3]:
            engine = Engine(model, Medusa(heads, model), 256)
            assert write(engine, [1, 2, 3], 24, sampling) == vanilla(model, [1, 2, 3], 24, sampling)


def knowing(model: Llama, own: bool, wrong: bool = False) -> MedusaHeads:
    """Heads for a target whose next token depends on the last one only: each maps the feature to the token that the
    text will have at its position or, with `wrong`, always to another one."""
    model.allocate_cache(256, 128)
    features = tiny.features(model, list(range(24)))  # [24, C], linearly independent
    inverse, due = torch.linalg.pinv(features.mT), features @ model.lm_head.weight.mT
    following = due.argmax(-1)
    heads, after = MedusaHeads(32, 4, 1, 24 if own else None).double(), following
    for head in range(4):
        guess, after = features[after], following[after]
        if own:
            one_hot = torch.zeros(24, 24, dtype=torch.float64).scatter(0, after[None], -1.0 if wrong else 1.0)
            heads.projections.data[head] = one_hot @ inverse
        else:  # silu(z) is z for large z, and what is added to make z large is nothing to the lm_head
            heads.weight.data[0, head] = ((-guess if wrong else guess) - features).mT @ inverse
            heads.bias.data[0, head] = 100
    return heads.requires_grad_(False)


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("wrong", [True, False])
def test_always_right_and_always_wrong(wrong: bool, own: bool) -> None:
    """Fails if heads are paired with another level, or read the feature of the position before or after: the text would
    not show it. Right heads must gain every level and the bonus token each cycle, wrong ones only the bonus token."""
    model, _ = tiny.pair(4, noise=0.0)
    model.lm_head.weight.data -= model.lm_head.weight.data.mean(1, keepdim=True)
    ids = tiny.prompt(0, 5)
    cycles = cycle_by_cycle(Engine(model, Medusa(knowing(model, own, wrong), model), 256), ids, 41)
    assert [len(cycle) for cycle in cycles] == [1] + ([1] * 40 if wrong else [5] * 8)
    assert len(set(sum(cycles, []))) > 2 and sum(cycles, []) == vanilla(model, ids, 41)


def test_noise_of_the_right_position(tmp_path: Path) -> None:
    """Fails if heads guess without the noise, or with that of another position. At this temperature the noise alone
    decides the text."""
    model = tiny.target(5)
    heads = heads_of(published(4, own=False), model, tmp_path)
    cycles = cycle_by_cycle(Engine(model, Medusa(heads, model), 256), [1, 2, 3], 41, Sampling(temperature=1e6, seed=7))
    assert [len(cycle) for cycle in cycles] == [1] + [5] * 8


# ----- Training --------------------------------------------------------------------------------------------------


def test_new_heads(tmp_path: Path) -> None:
    """Fails if new heads change the feature, cannot be trained, or differ after saving and loading."""
    heads, random = MedusaHeads(32, 3, 2), torch.Generator().manual_seed(0)
    features = torch.randn(2, 7, 32, generator=random)
    assert torch.equal(heads(features), features.expand(3, 2, 7, 32)) and heads.weight.dtype == torch.float32
    heads(features).square().sum().backward()
    assert all((p.grad[layer, head] != 0).any() for p in heads.parameters() for layer in range(2) for head in range(3))
    for p in heads.parameters():
        p.data = torch.randn(p.shape, generator=random) / 6
    out = heads(features)
    assert out.shape == (3, 2, 7, 32) and torch.equal(heads(features, 2), out[:2])
    assert torch.allclose(heads(features[1, 3]), out[:, 1, 3], atol=1e-6)
    save_medusa(heads, tmp_path / "new/heads")
    loaded = load_medusa(tmp_path / "new/heads", tiny.target(dtype=torch.float32))
    assert torch.equal(loaded(features), out)
