"""What a config.json means that leaves something out: the defaults of transformers 5 (configuration_llama.py and its
relatives)."""
import pytest
import tiny

from formats.config import Config

SHAPE = {key: value for key, value in tiny.SHAPE.items() if key not in (
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "model_type")}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_left_out(family: str) -> None:
    """Fails if a missing entry is taken for another value than transformers takes it for: an epsilon, a RoPE base, tied
    embeddings."""
    ours = Config.from_dict({"model_type": family} | SHAPE | {"num_key_value_heads": 2, "head_dim": 8,
                                                            "max_position_embeddings": 512, "sliding_window": None})
    assert (ours.rms_norm_eps, ours.rope_theta, ours.rope_scaling) == (1e-6, 10000.0, None)
    assert ours.tie_word_embeddings is False and ours.qk_norm == (family == "qwen3")


def test_heads_and_context() -> None:
    """Fails if a config without key/value heads, or without a head size, is not one of plain multi-head attention."""
    cfg = Config.from_dict({"model_type": "llama"} | SHAPE)
    assert cfg.num_kv_heads == cfg.num_heads == 4 and cfg.head_dim == 8
    assert cfg.max_position_embeddings == 2048 and cfg.sliding_window is None
