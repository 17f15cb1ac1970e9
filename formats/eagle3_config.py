"""config.json of EAGLE-3 heads: one Eagle3Config from what six publishers write, and what none of them can tell.

A head drafts from taps, hidden states of the target at several depths. A *boundary* b says where: the residual stream
that enters layer b. So 0 is the embeddings, and n is what the last of n layers leaves, before the final norm. All taps
here are boundaries. Some publishers write boundaries, others the layers whose outputs are meant, which is one less, and
many write nothing. Some also name a RoPE theta that the head was not trained with. So what a file cannot tell is
reported as doubtful, with the values to try. Once it was measured, measured.json beside the head says it:

    {"taps": [2, 16, 29], "rope_theta": 10000.0, "norm_output": false}
"""
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from formats.config import SAID_BY_TENSORS, Config
from formats.eagle import read_config
from formats.fields import positive

MEASURED = "measured.json"
SHARED = "share_lm_head"  # our entry of a config.json: the head drafts with the target's rows for the tokens of d2t
USUAL_THETA = 10000.0  # what the first training programs computed with, whatever the config said


@dataclass(frozen=True)
class Eagle3Config:
    """What the config of a head says. Which norms, biases, embedding and lm_head there are, its tensors say.

    layer: of the head's layers. hidden_size may differ from the target's; rope_theta, rope_scaling and sliding_window
    are the head's own (formats.config.Config); vocab_size is the target's.
    """
    layer: Config
    target_size: int  # hidden size of the target
    target_layers: int
    taps: tuple[int, ...]  # boundaries, ascending; (): it drafts from the target's features, without fc
    wide: tuple[bool, ...]  # which layers take [embedding; feature]; the others take what the layer before leaves
    draft_vocab_size: int  # tokens that are drafted
    norm_before_residual: bool  # the residual is the feature after its norm; False: before it
    norm_output: bool  # the next level is fed the output after the last norm; False: before it


class Found(NamedTuple):
    """What the tensors of a head say."""
    width: int
    intermediate_size: int
    qkv_rows: int
    heads_width: int | None  # heads * head_dim; None where int4 hides it
    qk_norm: bool
    wide: tuple[bool, ...]
    taps: int | None  # how many fc takes, 0 without fc; None where int4 hides it
    lm_head_rows: int | None  # None: there is no lm_head
    d2t_rows: int | None  # None: there is no d2t
    norms: dict[str, bool]  # the flag of a config -> whether the tensors for it are there


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what a wrong entry of a file raises into a ValueError that names the file."""
    try:
        yield
    except KeyError as e:
        raise ValueError(f"{path}: {e.args[0]} is missing") from None
    except (ValueError, TypeError, RecursionError, OverflowError) as e:
        raise ValueError(f"{path}: {e}") from None


# ----- Reading -----------------------------------------------------------------------------------------------------


def read_eagle3_config(folder: Path, found: Found, target: Config) -> tuple[Eagle3Config, dict[str, tuple]]:
    """The config of the head in this folder, and its doubts: fields that the file cannot tell -> the values to try, the
    config's first. Raises ValueError with one line for a config that contradicts the tensors, is of another target's
    head, or asks for what is not implemented."""
    with naming(folder / "config.json"):
        raw = flat(read_config(folder))
        refuse_variants(raw)
        check_flags(raw, found)
        layer = layer_config(raw, found, target)
    count = found.taps if flag(raw, "use_aux_hidden_state") is not False else 0
    with naming(folder / MEASURED):
        measured = read_measured(folder / MEASURED, count, target.num_layers)
    with naming(folder / "config.json"):
        possible = possible_values(raw, layer.rope_theta, count, target.num_layers, measured)
    first = {key: values[0] for key, values in possible.items()}
    drafted = found.lm_head_rows or (found.d2t_rows if flag(raw, SHARED) else None) or target.vocab_size
    config = Eagle3Config(replace(layer, rope_theta=first.pop("rope_theta")), target.hidden_size, target.num_layers,
                          wide=found.wide, draft_vocab_size=drafted, **first)
    return config, {key: values for key, values in possible.items() if len(values) > 1}


def flat(raw: dict, nested: str = "eagle_config") -> dict:
    """A config.json as one flat object without nulls. Where an entry stands in several places, the first counts of:
    transformer_layer_config (speculators' sizes), the top level, `nested` (others' flags). ValueError if empty."""
    if not raw:
        raise ValueError("missing, or no JSON object: a head comes with a config.json of its own")
    merged = {}
    for part in (raw.get(nested) or {}, raw, raw.get("transformer_layer_config") or {}):
        if not isinstance(part, dict):
            raise ValueError(f"{nested} and transformer_layer_config should be objects")
        merged |= {key: value for key, value in part.items() if value is not None}
    return merged


def is_speculators(raw: dict) -> bool:
    return "transformer_layer_config" in raw or "speculators_model_type" in raw


def flag(raw: dict, *keys: str) -> bool | None:
    """The first of these entries that is there; None if none is."""
    for key in keys:
        if key in raw:
            if not isinstance(raw[key], bool):
                raise ValueError(f"{key} should be true or false, not {repr(raw[key])[:60]}")
            return raw[key]
    return None


def layer_config(raw: dict, found: Found, target: Config) -> Config:
    """The Config of the head's layers. Sizes are those of the tensors, since configs have been wrong; what the tensors
    cannot tell, the number of heads, must fit them."""
    wanted = {"vocab_size": (target.vocab_size, "the target's"),
              "target_hidden_size": (target.hidden_size, "the target's"),
              "hidden_size": (found.width, "the width of the layers")}
    if found.lm_head_rows is None and not flag(raw, SHARED):
        wanted["draft_vocab_size"] = target.vocab_size, "as there is no lm_head but the target's"
    for key, (value, why) in wanted.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key} is {repr(raw[key])[:60]}, but should be {value}, {why}: another model's head?")
    cfg = Config.from_dict({key: value for key, value in raw.items() if key not in SAID_BY_TENSORS} | {
        "model_type": "qwen3" if found.qk_norm else "llama", "vocab_size": target.vocab_size,
        "hidden_size": found.width, "intermediate_size": found.intermediate_size,
        "num_hidden_layers": len(found.wide), "tie_word_embeddings": False})
    heads_width, kv_width = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    if found.qkv_rows != heads_width + 2 * kv_width or found.heads_width not in (None, heads_width):
        raise ValueError(f"{cfg.num_heads} heads and {cfg.num_kv_heads} key/value heads of head_dim {cfg.head_dim} do "
                         f"not fit the {found.qkv_rows} rows of q_proj, k_proj and v_proj: correct head_dim")
    return cfg


def refuse_variants(raw: dict) -> None:
    """ValueError for a config whose head computes something else."""
    kind = raw.get("speculators_model_type", "eagle3")
    steps = raw.get("parallel_draft_step", 1)
    refusals = {
        f"speculators_model_type {kind!r}": kind != "eagle3",
        "parallel_drafting": flag(raw, "parallel_drafting") is True,
        f"parallel_draft_step {steps!r}": steps not in (0, 1),
        "use_input_layernorm_in_first_layer false": flag(raw, "use_input_layernorm_in_first_layer") is False,
        "use_mtp_layernorm": flag(raw, "use_mtp_layernorm") is True}
    for what, is_asked_for in refusals.items():
        if is_asked_for:
            raise ValueError(f"{what[:90]} is not implemented")


def check_flags(raw: dict, found: Found) -> None:
    """ValueError where the config says one thing and the tensors another. Where the config says nothing the tensors
    decide, except that fc and the last norm are usual and must be there."""
    said = {"norm_before_fc": flag(raw, "norm_before_fc"), "fc_norm": flag(raw, "fc_norm", "use_aux_norm"),
            "use_last_layernorm": flag(raw, "use_last_layernorm") is not False}
    for key, is_there in found.norms.items():
        if said[key] not in (None, is_there):
            raise ValueError(f"{key} is {str(said[key]).lower()}, but the weights have {'' if is_there else 'not '}the "
                             "tensors for it: download both again")
    if flag(raw, SHARED) and (found.lm_head_rows or not found.d2t_rows):
        raise ValueError(f"{SHARED} is true, so the weights should have a d2t and no lm_head: download both again")
    if found.norms["norm_before_fc"] and found.norms["fc_norm"]:
        raise ValueError("the weights have the norms of both norm_before_fc and fc_norm, which exclude each other")
    if output_is_normed(raw) and not found.norms["use_last_layernorm"]:
        raise ValueError("norm_output is true, but the weights have no last norm")
    has_taps = flag(raw, "use_aux_hidden_state") is not False
    if has_taps and found.taps == 0:
        raise ValueError("use_aux_hidden_state is not false, but the weights have no fc.weight: download both again")
    if not has_taps and (found.norms["norm_before_fc"] or found.norms["fc_norm"]):
        raise ValueError("use_aux_hidden_state is false, but the weights have norms for taps: download both again")


# ----- What files cannot tell --------------------------------------------------------------------------------------


def possible_values(raw: dict, theta: float, count: int | None, num_layers: int, measured: dict) -> dict[str, tuple]:
    """For each field that has to be known or measured, its possible values, the likeliest first."""
    possible = {"rope_theta": (theta,), "norm_output": (output_is_normed(raw),)}
    if not is_speculators(raw) and theta != USUAL_THETA:
        possible["rope_theta"] = (theta, USUAL_THETA)
    # SpecForge's norm_output meant, before September 2026, that there is a last norm; its output was not fed on. (Its
    # false then meant no last norm, with a weight that stayed one: the order of the logits is the same.)
    if not is_speculators(raw) and flag(raw, "norm_output"):
        possible["norm_output"] = (True, False)
    possible |= {key: (value,) for key, value in measured.items()}
    if "taps" not in possible:
        possible["taps"] = possible_taps(raw, count, num_layers)
    if "norm_before_residual" not in possible:
        if is_speculators(raw) and "norm_before_residual" not in raw:  # its readers disagree about the default
            raise ValueError("norm_before_residual is missing, and nothing else tells it: ask the publisher")
        possible["norm_before_residual"] = (flag(raw, "norm_before_residual") is True,)
    return possible


def output_is_normed(raw: dict) -> bool:
    return bool(flag(raw, "norm_output") or flag(raw, "return_hidden_post_norm"))


def usual_taps(num_layers: int) -> tuple[int, int, int]:
    """What all publishers take if a config says nothing. Below 7 layers they are not three different ones."""
    return 2, num_layers // 2, num_layers - 3


def possible_taps(raw: dict, count: int | None, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """The possible taps, likeliest first. count: how many there are; None if that is not known.

    target_layer_ids are outputs. eagle_aux_hidden_state_layer_ids are boundaries where they are the usual taps or in a
    file of speculators, and outputs where they are the usual outputs. Else SGLang's rule says what is likelier: a list
    that begins with 1 is one of outputs. (vLLM always reads boundaries, older versions of SGLang outputs.)
    """
    if count == 0:
        return ((),)
    ids = raw.get("eagle_aux_hidden_state_layer_ids")
    outputs = raw.get("target_layer_ids")
    usual = usual_taps(num_layers)
    if not ids and not outputs:
        candidates = [usual]
    else:
        listed = ids or outputs
        if not isinstance(listed, list) or not all(type(i) is int for i in listed):
            raise ValueError(f"the layers to tap should be a list of whole numbers, not {repr(listed)[:60]}")
        boundaries = tuple(sorted(listed))
        after = tuple(i + 1 for i in boundaries)
        if not ids or after == usual:
            candidates = [after]
        elif boundaries == usual or is_speculators(raw):
            candidates = [boundaries]
        else:
            candidates = [after, boundaries] if listed[0] == 1 else [boundaries, after]
    possible = tuple(taps for taps in candidates if are_taps(taps, count, num_layers))
    if not possible:
        raise ValueError(f"taps {list(candidates[0])[:9]} do not fit a target of {num_layers} layers and an fc for "
                         f"{count or 'some'} of them: another model's head, or eagle_aux_hidden_state_layer_ids is "
                         "missing")
    return possible


def are_taps(taps: tuple[int, ...], count: int | None, num_layers: int) -> bool:
    """Whether these are `count` boundaries of the target (None: any number of them), each once, in order."""
    return (count in (None, len(taps)) and list(taps) == sorted(set(taps))
            and all(0 <= boundary <= num_layers for boundary in taps))


def read_measured(path: Path, count: int | None, num_layers: int,
                  flags: tuple[str, ...] = ("norm_output", "norm_before_residual"),
                  numbers: tuple[str, ...] = ("rope_theta",)) -> dict:
    """The fields that measured.json says, of the taps and these; {} if there is none."""
    if not path.is_file():
        return {}
    raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(raw.keys() - {"taps", *flags, *numbers}):
        raise ValueError(f"{unknown[0][:60]} is no field that is measured")
    measured = {key: flag(raw, key) for key in flags if key in raw}
    measured |= {key: positive(raw, key, kind=float) for key in numbers if key in raw}
    if "taps" in raw:
        taps = raw["taps"]
        if not (isinstance(taps, list) and all(type(i) is int for i in taps)
                and are_taps(tuple(taps), count, num_layers)):
            raise ValueError(f"taps should be {count or 'some'} boundaries from 0 to {num_layers} in ascending order, "
                             f"not {repr(taps)[:60]}")
        measured["taps"] = tuple(taps)
    return measured


# ----- Writing -----------------------------------------------------------------------------------------------------


def measured_json(cfg: Eagle3Config) -> dict:
    """The measured.json of a head of which all is known."""
    return {"taps": list(cfg.taps), "rope_theta": cfg.layer.rope_theta, "norm_output": cfg.norm_output,
            "norm_before_residual": cfg.norm_before_residual}


def eagle3_config_json(cfg: Eagle3Config, norms: dict[str, bool], attention_bias: bool, mlp_bias: bool, shared: bool
                       ) -> dict:
    """The config.json of a head that SGLang and vLLM read as this config. norms: as Found's. shared: the head has a
    draft vocabulary and no lm_head, which only this project reads.

    The usual taps are left out, which all readers understand. Others are written as boundaries, since vLLM reads all
    numbers so, and SGLang reads those so that do not begin with 1. ValueError for taps that do.
    """
    layer = cfg.layer
    nested = {"use_aux_hidden_state": bool(cfg.taps), "use_last_layernorm": norms["use_last_layernorm"],
              "norm_before_fc": norms["norm_before_fc"]}  # SGLang reads it here, vLLM below
    if cfg.taps and cfg.taps != usual_taps(cfg.target_layers):
        if cfg.taps[0] == 1:
            raise ValueError(f"taps {list(cfg.taps)}: SGLang would read numbers that begin with 1 as outputs, and vLLM "
                             "as boundaries; choose another first tap")
        nested["eagle_aux_hidden_state_layer_ids"] = list(cfg.taps)
    # What is false is left out: SpecForge's programs before September 2026 took a false norm_output for no last norm.
    flags = {"norm_output": cfg.norm_output, "norm_before_fc": norms["norm_before_fc"], "fc_norm": norms["fc_norm"],
             SHARED: shared}
    return {"architectures": ["LlamaForCausalLMEagle3"], **sizes_json(layer), "draft_vocab_size": cfg.draft_vocab_size,
            "target_hidden_size": cfg.target_size, "attention_bias": attention_bias, "mlp_bias": mlp_bias,
            "norm_before_residual": cfg.norm_before_residual, "eagle_config": nested,
            **{key: True for key, is_set in flags.items() if is_set}}


def sizes_json(layer: Config) -> dict:
    """What a head's config.json says of its layers, in the words of transformers."""
    return {"model_type": "qwen3" if layer.qk_norm else "llama", "hidden_size": layer.hidden_size,
            "intermediate_size": layer.intermediate_size, "num_hidden_layers": layer.num_layers,
            "num_attention_heads": layer.num_heads, "num_key_value_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim, "hidden_act": "silu", "rms_norm_eps": layer.rms_norm_eps,
            "rope_theta": layer.rope_theta, "rope_scaling": layer.rope_scaling, "vocab_size": layer.vocab_size,
            "max_position_embeddings": layer.max_position_embeddings, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16"}
