"""benchmarks/widen.py: a small model in a large shape computes, writes and drafts what it did before, and few of the
large weights are zero.

In float64 the order of sums makes the only difference, so that a forgotten term of any size shows.
"""
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from benchmarks.widen import FIELDS, SHAPES, wide_config, widen_head, widen_model
from draft import Eagle2, EagleHead, Vanilla
from drafters.eagle1 import Eagle1
from engine import Engine
from model import Llama
from quant.linear import quantize_linears
from sampling import Sampling
from tokenizer import Tokenizer

V, C = tiny.SHAPE["vocab_size"], tiny.SHAPE["hidden_size"]
MHA = dict(zip(FIELDS, (V, 80, 128, 4, 6, 6, 16)))
TARGETS = {  # the tiny model has 4 query heads on 2 key/value heads of dimension 8
    "mha": MHA,
    "same heads": MHA | {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "num_layers": 2},
    "gqa with spare heads": MHA | {"num_heads": 12, "num_kv_heads": 3},  # 4 slots for 2 queries
    "gqa of other groups": MHA | {"num_heads": 12, "num_kv_heads": 4, "head_dim": 24},  # 3 slots for 2 queries
    "head_dim x 4": MHA | {"num_kv_heads": 3, "head_dim": 32},
    "just wide enough": MHA | {"hidden_size": C + 1, "intermediate_size": 48},
    "padded": MHA | {"vocab_size": 3 * V},
}
PARAMETERS = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248}


def noise(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def widened(model: Llama, head: EagleHead, shape: dict[str, int], seed: int = 0) -> tuple[Llama, EagleHead]:
    random, dtype = noise(seed), model.embed.weight.dtype
    return widen_model(model, shape, dtype=dtype, generator=random), widen_head(
        head, shape, dtype=dtype, generator=random)


@torch.inference_mode()
def outputs(model: Llama, head: EagleHead, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The target's features, and the head's output for them and the ids, both [len(ids), C]."""
    model.allocate_cache(len(ids))
    head.allocate_cache(len(ids))
    features = tiny.features(model, ids)
    x = head.fc(torch.cat((model.embed(torch.tensor(ids)), features), -1))
    return features, head(x[None], head.rope[:, :len(ids)])[0]


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("shape", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 5e-5)], ids=["fp64", "fp32"])
def test_same_features_and_logits(shape: dict[str, int], dtype: torch.dtype, tolerance: float):
    """Fails if norms, keys or eps are scaled wrongly, if rotary pairs are in the wrong place, if a slot reads another
    key/value head, or if a dead channel is not zero."""
    ids, model = tiny.prompt(3, 60), tiny.target(dtype=dtype, rms_norm_eps=0.05)  # an eps that cannot be forgotten
    head = tiny.head(model, fc_bias=True, rms_norm_eps=0.3)
    wide, wide_head = widened(model, head, shape)
    assert 0 <= wide.cfg.rms_norm_eps < 0.05 and 0 <= wide_head.cfg.rms_norm_eps < 0.3
    for ours, theirs in zip(outputs(wide, wide_head, ids), outputs(model, head, ids)):
        assert_near(ours[:, :C], theirs, tolerance)
        assert not ours[:, C + 1:].any(), "dead channels must be exactly zero"
        assert_near(wide.lm_head(ours)[:, :V], model.lm_head(theirs), tolerance)


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"num_key_value_heads": 1},
                                     {"tie_word_embeddings": True}, {"rope_theta": 100.0}],
                         ids=["mha", "mqa", "tied", "theta"])
def test_other_small_models(changes: dict):
    """Fails for small models with other groups of heads, tied embeddings or another base of RoPE."""
    ids, model = tiny.prompt(4, 50), tiny.target(**changes)
    head = tiny.head(model, **{k: v for k, v in changes.items() if "tie" not in k})
    for shape in (MHA, TARGETS["gqa of other groups"]):
        wide, wide_head = widened(model, head, shape)
        assert wide.lm_head.weight is not wide.embed.weight and not wide.cfg.tie_word_embeddings
        for ours, theirs in zip(outputs(wide, wide_head, ids), outputs(model, head, ids)):
            assert_near(ours[:, :C], theirs, 1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mha", "gqa with spare heads", "padded"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "sampled"])
def test_same_cycles(name: str, sampling: Sampling):
    """Fails if the widened pair does not commit, cycle by cycle, what the small pair does. Padding with any probability
    would change sampled text and the scores that trees are made of."""
    model, head = tiny.pair(seed=7, noise=0.1)
    wide, wide_head = widened(model, head, TARGETS[name])
    accepted = 0
    for seed in range(2):
        ids = tiny.prompt(seed, 12)
        for ours, theirs in ((Vanilla(), Vanilla()), (Eagle1(wide_head, wide), Eagle1(head, model)),
                             (Eagle2(wide_head, wide, 20, 4, 4), Eagle2(head, model, 20, 4, 4))):
            expected = list(Engine(model, theirs, 128).generate(ids, 40, sampling))
            assert list(Engine(wide, ours, 128).generate(ids, 40, sampling)) == expected
            accepted += 40 - len(expected)
    assert accepted > 40, "too few drafts accepted to say that they are the same"


@pytest.mark.slow
def test_noise_reaches_nothing():
    """Fails if another noise changes a single bit: noise must meet zeros or never be read."""
    model, ids, head = tiny.target(), tiny.prompt(6, 30), tiny.head(tiny.target())
    for shape in TARGETS.values():
        (wide, wide_head), (other, other_head) = (widened(model, head, shape, seed) for seed in (1, 2))
        assert not torch.equal(wide.layers[0].w2.weight, other.layers[0].w2.weight) or shape["hidden_size"] == C + 1
        for ours, theirs in zip(outputs(wide, wide_head, ids), outputs(other, other_head, ids)):
            assert torch.equal(ours, theirs)
            assert torch.equal(wide.lm_head(ours), other.lm_head(theirs))


def test_padding_never_wins():
    """Fails if padding wins where every real logit is negative, even without the constant, or if it has any probability
    with the constant."""
    model = tiny.target()
    model.lm_head.weight.data += 3
    wide = widen_model(model, TARGETS["padded"], dtype=torch.float64)
    features = torch.zeros(1000, 80, dtype=torch.float64)
    features[:, :C] = torch.randn(1000, C, generator=noise(7), dtype=torch.float64) - 1
    logits = wide.lm_head(features)
    assert (logits[:, :V].amax(1) < 0).sum() > 100
    assert (logits[:, V:].amax(1) < logits[:, :V].amax(1)).all()
    ours = outputs(wide, widen_head(tiny.head(model), TARGETS["padded"], dtype=torch.float64), tiny.prompt(8, 60))
    for logits in map(wide.lm_head, ours):
        assert logits.softmax(-1)[:, V:].sum(1).max() < 1e-30


def test_cut_vocabulary():
    """Fails if kept ids in any order change the text, translated back, where the small model writes only kept ids."""
    model = tiny.target(vocab_size=60)
    ids = tiny.prompt(9, 12, 60)
    text = sum(Engine(model, Vanilla(), 128).generate(ids, 40), [])
    keep = sorted(set(ids + text), key=lambda i: i * 7 % 61) + [min(set(range(60)) - set(ids + text))]
    assert len(keep) < 50, "nothing to cut"
    for size in (len(keep), len(keep) + 5):
        wide = widen_model(model, MHA | {"vocab_size": size}, keep, dtype=torch.float64)
        ours = sum(Engine(wide, Vanilla(), 128).generate([keep.index(i) for i in ids], 40), [])
        assert [keep[i] for i in ours] == text


def busy(module: nn.Module) -> float:
    return sum((p != 0).sum().item() for p in module.parameters()) / sum(p.numel() for p in module.parameters())


def test_dead_weights_are_noise():
    """Fails if many weights are zero, which would cost less power than a real model. C is a seventh of C' here."""
    shape = dict(zip(FIELDS, (V, 7 * C, 7 * 48, 3, 16, 16, 16)))
    wide, head = widened(tiny.target(), tiny.head(tiny.target()), shape)
    for part in (*wide.layers, head):
        assert busy(part) > 0.9
    assert busy(wide.lm_head) > 0.99
    for module in (wide, head):
        for name, weight in module.named_parameters():
            assert weight.isfinite().all() and not weight.requires_grad and weight.dtype == torch.float64, name


@pytest.mark.slow
def test_bf16_is_as_near_as_the_small_model():
    """Fails if rounding fp32 weights to bf16 costs the widened model more than the small one."""
    off = []
    for seed in range(4):
        model, ids = tiny.target(seed, torch.float32), tiny.prompt(seed, 60)
        exact = tiny.features(model_with_cache(model), ids)
        wide = widen_model(model, MHA, generator=noise(seed))
        small = model_with_cache(tiny.target(seed, torch.bfloat16))
        off.append([(tiny.features(m, ids)[:, :C].float() - exact).norm() for m in (model_with_cache(wide), small)])
    ours, theirs = torch.tensor(off).mean(0)
    assert 0 < ours < 1.5 * theirs


def model_with_cache(model: Llama) -> Llama:
    model.allocate_cache(64)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_size_of_their_models(name: str):
    """Fails if a shape does not have the number of parameters of the model that it is named after."""
    cfg = wide_config(replace(tiny.target().cfg, head_dim=64, rope_theta=1e5, num_kv_heads=1), SHAPES[name])
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(cfg).parameters()) == PARAMETERS[name]
    assert cfg.rope_theta == 1e5 and cfg.rope_scaling is None


@pytest.mark.parametrize("shape, kept_ids, message", [
    ({"hidden_size": C}, None, f"hidden_size {C + 1} or more"),  # the constant needs a channel
    ({"intermediate_size": 47}, None, "intermediate_size 48 or more"),
    ({"num_layers": 1}, None, "num_layers 2 or more"),
    ({"num_heads": 3, "num_kv_heads": 3}, None, "num_kv_heads 4 or more"),
    ({"head_dim": 12}, None, "head_dim 12"),
    ({"num_heads": 7, "num_kv_heads": 6}, None, "7 heads and 6"),
    ({"vocab_size": V - 1}, None, f"1 to {V - 1} distinct ids below {V}"),
    ({}, [1, 2, 1], "distinct"), ({}, [V], "distinct"), ({}, [-1], "distinct"), ({}, [], "distinct")])
def test_what_does_not_fit(shape: dict[str, int], kept_ids: list[int] | None, message: str):
    """Fails if a shape or ids that do not fit are not refused, or the message does not say why."""
    with pytest.raises(ValueError, match=message):
        widen_model(tiny.target(), MHA | shape, kept_ids)


def test_heads_rotated_in_part() -> None:
    """Fails if a model whose heads are rotated in part is widened to other frequencies, or refused where its heads stay
    as they are."""
    model = tiny.target(model_type="phi3", partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match="of 8, of which 4 are rotated, do not widen to a shape with head_dim 16"):
        widen_model(model, MHA)
    ids = tiny.prompt(3, 60)
    wide = widen_model(model, TARGETS["same heads"], dtype=torch.float64)
    features = [tiny.features(model_with_cache(each), ids)[:, :C] for each in (wide, model)]
    assert_near(*features, 1e-12)


def test_biases_of_attention_are_refused():
    """Fails if biases that would be lost are not refused."""
    model = tiny.target()
    with pytest.raises(ValueError, match="biases"):
        widen_head(tiny.head(model, qkv_bias=True), MHA)


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_demo(demo_model: Llama, demo_head: EagleHead, demo_prompts: list[list[int]], demo):
    """Fails if the demo model and its head, in fp32, with heads twice as long and none shared, do not commit the same
    tokens in the same cycles."""
    stop, ids = Tokenizer(demo).stop_ids, demo_prompts[6]
    shape, dtype = dict(zip(FIELDS, (49_200, 600, 1536, 31, 9, 9, 128))), torch.float32
    wide, wide_head = widen_model(demo_model, shape, dtype=dtype), widen_head(demo_head, shape, dtype=dtype)
    cycles = list(Engine(demo_model, Eagle2(demo_head, demo_model, 8, 3, 3), 128, stop).generate(ids, 12))
    assert list(Engine(wide, Eagle2(wide_head, wide, 8, 3, 3), 128, stop).generate(ids, 12)) == cycles
    assert len(cycles) < 9, "too few drafts accepted to say that they are the same"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int8dyn", "int4"])
def test_quantized_layer_by_layer(mode: str):
    """Fails if quantising layer by layer, which a 13B needs in order to fit, differs from quantising the whole
    model."""
    whole = widen_model(tiny.target(), MHA, generator=noise(0))
    quantize_linears(whole, mode, 64)
    parts = widen_model(tiny.target(), MHA, generator=noise(0), quantize=(mode, 64))
    assert whole.state_dict().keys() == parts.state_dict().keys()
    assert all(tensor.equal(parts.state_dict()[name]) for name, tensor in whole.state_dict().items())
