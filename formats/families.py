"""Families of models: what their config.json means, where it differs from a Llama's.

A family that is not a Llama by name is one by conversion: tensors are renamed, split, reordered or multiplied
(formats/fold.py), and model.py runs the result. To add one, add a row to FAMILIES, and a line to the table in
docs/usage.md. config.json stays as published; Config.from_dict and the converter read it through `llama_words`.
"""
import re
from dataclasses import dataclass, field

from formats.fields import is_neutral

QWEN = {"sliding_window": 4096, "max_window_layers": 28}
YARN_OF_MINISTRAL = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "mscale": 1.0,
    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
LLAMA3_OF_CWM = {
    "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GRANITE = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


@dataclass(frozen=True)
class Family:
    """A model_type.

    defaults: of transformers' config class, where a missing entry is not what Config.from_dict takes it for.
    biases: "always" if q, k and v have biases, or the entry that says so; "" if they have none.
    refused: entries for biases that model.py has no place for, in the MLP and the attention output.
    slides: which layers have the sliding window. "size": all, if there is a size. Others: those in layer_types; without
    it, "layers": all, "flag": if use_sliding_window is true. own: entries that change a Llama and are implemented.
    interleaved: RoPE turns the pairs (2j, 2j + 1) of a head, not (j, j + D / 2).
    """
    defaults: dict = field(default_factory=dict)
    biases: str = ""
    refused: tuple[str, ...] = ("attention_bias", "mlp_bias")
    slides: str = "flag"
    own: tuple[str, ...] = ()
    interleaved: bool = False


FAMILIES = {
    "llama": Family(),
    "mistral": Family({"sliding_window": 4096}, refused=(), slides="size"),
    "qwen2": Family(QWEN, biases="always", refused=()),
    "qwen3": Family(QWEN, refused=("attention_bias",)),
    # Llamas by another name.
    "ministral": Family({"sliding_window": 4096, "num_key_value_heads": 8}, refused=(), slides="layers"),
    "ministral3": Family({"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                          "max_position_embeddings": 262144, "rope_parameters": YARN_OF_MINISTRAL},
                         refused=(), slides="size"),
    "internlm3": Family({"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
                        refused=("attention_bias", "qkv_bias", "bias", "mlp_bias")),
    "iquestcoder": Family({"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
    "seed_oss": Family({"head_dim": 128, "num_key_value_heads": 8, "attention_bias": True}, biases="attention_bias",
                       refused=("attention_out_bias", "mlp_bias")),
    "cwm": Family({"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": 8192,
                   "rope_parameters": LLAMA3_OF_CWM}, refused=("mlp_bias",), slides="layers"),
    # Phi-3, 3.5 and 4: q, k, v in one matrix, gate and up in another. Phi-4-mini rotates 3/4 of each head.
    "phi3": Family({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
                   refused=(), slides="size", own=("partial_rotary_factor",)),
    # Granite 3: four multipliers.
    "granite": Family(dict.fromkeys(GRANITE, 1.0), own=GRANITE),
    # SmolLM3: every fourth layer has no RoPE.
    "smollm3": Family({"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": 32768,
                       "rope_theta": 2e6},
                      own=("no_rope_layers", "no_rope_layer_interval")),
    # GLM-4-9B-chat-hf: RoPE on half of each head.
    "glm": Family({"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7, "partial_rotary_factor": 0.5,
                   "attention_bias": True}, biases="attention_bias", refused=(), own=("partial_rotary_factor",),
                  interleaved=True),
    "ernie4_5": Family({"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
                        "tie_word_embeddings": True}, refused=("use_bias",), interleaved=True),
    "helium": Family({"head_dim": 128, "num_key_value_heads": 20, "rms_norm_eps": 1e-8, "rope_theta": 1e5},
                     biases="attention_bias", refused=("mlp_bias",), interleaved=True),
}
# Text models within a model that sees images too; its vision tower is left out.
WRAPPERS = {"mistral3": "mistral"}  # and the text model's model_type where text_config does not say it
RUN_AS = {("llama", "internlm3"), ("llama", "iquestcoder")}  # transformers' class for these model_types
# Why well-known others are not implemented.
REASONS = {
    r"(gemma|cohere|olmo|exaone4|glm4|hunyuan|apertus|nemotron|phi$|phi_|starcoder|gpt|falcon|stablelm|minicpm|arcee)":
        "its layers compute something else: other norms, activations or soft caps",
    r"(mixtral|.*_?moe|qwen3_next|deepseek|gpt_oss|llama4|dbrx|kimi|minimax|ernie4_5_)": "it has a mixture of experts",
    r"(qwen3_5|mamba|jamba|lfm2|falcon_h1|granitemoehybrid|rwkv|bamba|zamba)": "its layers keep a state, not a cache",
    r"(chatglm)": "its code comes with the weights: take the version for transformers, such as THUDM/glm-4-9b-chat-hf",
}


def llama_words(raw: dict) -> dict:
    """A config.json with the defaults of its family and, of a model that sees images, the text model's entries.

    Raises KeyError or ValueError for a model_type that is missing or not implemented.
    """
    model_type = raw["model_type"]
    if isinstance(model_type, str) and model_type in WRAPPERS:
        raw = text_model(raw)
        model_type = raw["model_type"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = next((reason for pattern, reason in REASONS.items() if re.match(pattern, str(model_type))), None)
        raise ValueError(f"model_type {model_type!r} is not implemented" + (f": {why}" if why else ""))
    defaults = FAMILIES[model_type].defaults
    if raw.get("rope_scaling"):  # transformers reads it in place of rope_parameters, its default included
        defaults = {key: value for key, value in defaults.items() if key != "rope_parameters"}
    return defaults | {key: value for key, value in raw.items() if value is not None or key not in (
        "rope_parameters", "no_rope_layers", "tie_word_embeddings")}


def text_model(raw: dict) -> dict:
    """The entries of text_config, and those beside it that are about the text model too: how weights are quantised, and
    whether the embedding is tied (as transformers, which looks beside text_config)."""
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise ValueError("text_config should be an object, with the sizes of the text model")
    for key in ("rope_scaling", "rope_parameters", "rope_theta", "sliding_window", "layer_types"):
        if raw.get(key) is not None and raw[key] != text.get(key):
            raise ValueError(f"{key} is beside text_config, where transformers ignores it: move it inside")
    refuse_other_architecture(raw)
    own = {key: raw[key] for key in ("quantization_config", "quantization", "compression_config") if raw.get(key)}
    tied = raw.get("tie_word_embeddings")
    return {"model_type": WRAPPERS[raw["model_type"]], **text, **own,
            "tie_word_embeddings": True if tied is None else tied}


def refuse_other_architecture(raw: dict) -> None:
    """Raise ValueError if `architectures`, such as ["Qwen2ForCausalLM"], is of another family than model_type."""
    names = raw.get("architectures") or []
    for name in [names] if isinstance(names, str) else names:
        family = re.sub(r"(For[A-Z]|LMHead|PreTrained|Model).*", "", str(name)).lower()
        if family.replace("_", "") != raw["model_type"].replace("_", "") and (family, raw["model_type"]) not in RUN_AS:
            raise ValueError(f"architectures {name!r} contradicts model_type {raw['model_type']!r}: one of them is "
                             "wrong")


def has_biases(raw: dict) -> bool:
    """Whether q, k and v have biases that transformers uses, of a config.json in Llama's words."""
    key = FAMILIES[raw["model_type"]].biases
    return key == "always" or bool(key and raw.get(key))


def layers_without_rope(raw: dict, num_layers: int) -> tuple[int, ...]:
    """The layers whose queries and keys are not rotated, of a config.json in Llama's words."""
    if "no_rope_layers" not in FAMILIES[raw["model_type"]].own:
        return ()
    flags = raw.get("no_rope_layers")  # 1 where a layer has RoPE
    if flags is None:
        step = raw.get("no_rope_layer_interval", 4)
        if not isinstance(step, int) or isinstance(step, bool) or step < 1:
            raise ValueError(f"no_rope_layer_interval should be a positive whole number, not {step!r}")
        return tuple(range(step - 1, num_layers, step))
    if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
        raise ValueError(f"no_rope_layers should be a list of {num_layers} zeros and ones")
    return tuple(i for i, flag in enumerate(flags[:num_layers]) if not flag)


# Keys that other families use for numbers which change the computation, such as Granite's residual_multiplier.
CHANGES = re.compile(r"(^|_)(rope|nope|rotary|yarn|ntk|mup)|scal|multiplier|soft_?cap|_cap(ping)?(_|$)|window|clip")
# Keys that match too: read elsewhere, or saying what other keys say.
KNOWN = {"rope_scaling", "rope_parameters", "rope_theta", "use_rope", "sliding_window", "use_sliding_window",
         "max_window_layers", "ffn_dim_multiplier"}


def refuse_other_families(raw: dict, neutral: dict[str, float]) -> None:
    """Raise ValueError for a number by which another family changes the computation, unless it changes nothing.

    Such a config is of Granite, Cohere, Gemma, SmolLM3, MiniCPM or a relative, under another's model_type: the weights
    have the same names and would load. `neutral`: what the value of a key would be here, of keys of any name.
    """
    for key, value in raw.items():
        if key in KNOWN or key in FAMILIES[raw["model_type"]].own or key.startswith("init"):  # training only
            continue
        if key in neutral and isinstance(value, int | float) and abs(value / neutral[key] - 1) < 1e-6:
            continue
        if (key in neutral and value is not None) or (CHANGES.search(key.lower()) and not is_neutral(key, value)):
            raise ValueError(f"{key} {repr(value)[:60]} is not implemented: no field of a {raw['model_type']} model, "
                             "but of a family that computes something else")
