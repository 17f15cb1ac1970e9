"""Every kind of layer through the kernels of a GPU, against float64 on a CPU: Llama, Qwen2 with biases of q, k and v,
Qwen3 with norms of q and k, layers without RoPE or with RoPE on a part of each head. Comparing drafters with vanilla
decoding on the same GPU cannot see what both do wrong.

    python -m pytest tests/gpu/test_gpu_families.py -q
"""
import pytest
import tiny
import torch
from gpu_tools import ties
from helpers import GREEDY, SAMPLINGS, write

from draft import Drafter, Eagle2, Vanilla
from drafters.block import Block
from engine import Engine
from formats.config import Config
from model import Llama
from quant.linear import MODES, quantize_linears

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Heads of 24 elements: not hidden size / heads, and no power of two.
SHAPE = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 24, "rms_norm_eps": 1e-3}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"model_type": "qwen3"}, "one key head": {"num_key_value_heads": 1},
            "tied": {"tie_word_embeddings": True},
            "a layer without RoPE": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
            "RoPE on half of a head": {"model_type": "phi3", "partial_rotary_factor": 0.5}}
IDS = tiny.prompt(2, 90, 200)  # a prefill of 90 rows, which cuBLAS does; a decoding step is the kernels'
COUNT = 48


def family(name: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Llama:
    """A tiny model of this family: the same weights each time, rounded to bf16, which every dtype holds exactly."""
    model = Llama(Config.from_dict(tiny.SHAPE | SHAPE | FAMILIES[name]), qkv_bias=name == "qwen2")
    tiny.randomise(model, 7, torch.bfloat16)
    return model.to(device, dtype)


def eagle2(model: Llama) -> Drafter:
    """EAGLE-2 with a tiny head for `model`, which has biases where Qwen2's has."""
    head = tiny.head(model, qkv_bias=model.layers[0].wqkv.bias is not None)
    return Eagle2(head.to(model.embed.weight.device), model, 24, 4, 5)


def eagle3(model: Llama) -> Drafter:
    """The same with a tiny EAGLE-3 head: two layers, a draft vocabulary, norms of q and k where Qwen3 has them."""
    kind = "qwen3" if model.cfg.qk_norm else "llama"
    head = tiny.head3(model, wide=(True, False), ids=list(range(199, 60, -3)), model_type=kind, num_attention_heads=4,
                      num_key_value_heads=2, head_dim=24)
    head.vocab = head.vocab.to(model.embed.weight.device)
    return Eagle2(head.to(model.embed.weight.device), model, 24, 4, 5)


def block(model: Llama, markov: str | None = None) -> Drafter:
    """Block drafting with a tiny head of heads of 24 elements."""
    head = tiny.block(model, num_attention_heads=4, num_key_value_heads=2, head_dim=24, markov=markov)
    return Block(head.to(model.embed.weight.device), model, 40, 6)


def engine(model: Llama, drafter: Drafter) -> Engine:
    return Engine(model, drafter, 256)


@pytest.mark.parametrize("name", FAMILIES)
def test_fp32_writes_what_float64_writes(name: str) -> None:
    """Fails if a norm, a bias, an epsilon, an angle or a slot is wrong in a kernel, for one row or for a tree: the
    texts, greedy and sampled, must be those of float64 on a CPU."""
    assert not torch.backends.cuda.matmul.allow_tf32
    exact, model = family(name), family(name, torch.float32, "cuda")
    for how in (GREEDY, *SAMPLINGS[1:4]):
        text = write(engine(exact, Vanilla()), IDS, COUNT, how)
        assert len(set(text)) > COUNT // 4  # else the comparison would show little
        for drafter in (Vanilla("cuda"), eagle2(model), eagle3(model), block(model, "vanilla")):
            assert write(engine(model, drafter), IDS, COUNT, how) == text
        for markov in (None, "vanilla", "rnn"):  # the same drafts are accepted
            cycles = [list(engine(m, block(m, markov)).generate(IDS, COUNT, how)) for m in (exact, model)]
            assert sum(cycles[1], []) == text
            assert sum(a != b for a, b in zip(*cycles)) <= 1


def shortfalls(exact: Llama, text: list[int]) -> torch.Tensor:
    """How far below the best score of float64 each token of `text` lies, in standard deviations of the scores."""
    logits = tiny.logits(exact, IDS + text)[len(IDS) - 1:-1]
    chosen = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
    return (logits.amax(1) - chosen) / logits.std()


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_writes_it_but_for_ties(name: str) -> None:
    """Fails if in bf16, whose kernels are others than fp32's, a token is written that float64 would not nearly have
    written in its place, or if EAGLE-2's text is not vanilla's, but for near-ties."""
    exact, model = family(name), family(name, torch.bfloat16, "cuda")
    exact.allocate_cache(256)
    vanilla = engine(model, Vanilla("cuda"))
    text = write(vanilla, IDS, COUNT)
    below = shortfalls(exact, text)
    assert below.max() < 0.4 and (below > 0).sum() <= COUNT // 4, below
    drafted = write(engine(model, eagle2(model)), IDS, COUNT)
    assert shortfalls(exact, drafted).max() < 0.4 and len(ties(vanilla, IDS, drafted)) <= COUNT // 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_quantised(name: str, mode: str) -> None:
    """Fails if biases or norms get lost in the kernels for integers. Their own twins on a CPU are the reference: the
    same integers, computed in float64."""
    model = family(name, torch.bfloat16, "cuda")
    quantize_linears(model, mode)
    twin = family(name, torch.bfloat16)
    quantize_linears(twin, mode)
    twin.load_state_dict({key: t.cpu() for key, t in model.state_dict().items()})
    twin = twin.double()  # in fp32 the CPU's own integer kernels round activations once more
    twin.allocate_cache(256)
    vanilla = engine(model, Vanilla("cuda"))
    text = write(vanilla, IDS, COUNT)
    below = shortfalls(twin, text)
    assert below.max() < 0.6 and (below > 0).sum() <= COUNT // 3, below
    head = eagle2(model).head
    head.quantize(mode)
    drafted = write(engine(model, Eagle2(head, model, 24, 4, 5)), IDS, COUNT)
    assert shortfalls(twin, drafted).max() < 0.6 and len(ties(vanilla, IDS, drafted)) <= COUNT // 3
