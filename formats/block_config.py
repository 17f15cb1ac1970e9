"""config.json of block heads (DFlash, DSpark, JetSpec): one BlockConfig from what their publishers write.

Three facts cannot be told from the tensors, and many files do not say them. Read wrongly, a head still writes the right
text, but next to none of its drafts are accepted:

    anchor_first  which token the first row of a block drafts: the one after the anchor, or none
    causal        whether a row of a block sees the rows after it
    taps          whether numbers of layers mean what enters a layer (boundaries) or what leaves it, one boundary later

What a file leaves open is reported as doubtful, with the values to try. Once it was measured, measured.json beside the
head says it:

    {"taps": [2, 10, 18, 26, 34], "anchor_first": false, "causal": false}
"""
import json
from dataclasses import dataclass
from pathlib import Path

from formats.config import Config
from formats.eagle import read_config
from formats.eagle3_config import (
    MEASURED,
    SHARED,
    Found,
    are_taps,
    flag,
    flat,
    is_speculators,
    layer_config,
    naming,
    read_measured,
    sizes_json,
)
from formats.fields import positive

NESTED = "dflash_config"  # where the entries are that only block heads have
MARKOV = ("vanilla", "gated", "rnn")  # the kinds of Markov head
CAUSAL = ("is_causal", "causal", "causal_head")  # one flag in three spellings; the first that is there counts
WINDOW_NOT_CAUSAL = "sliding_window_non_causal"  # speculators' flag: rows see later rows in sliding layers too
MAX_ROWS = 64  # of a block
# Where these entries say anything else, the head computes something else.
IMPLEMENTED = {"projector_type": ("dflash", "dspark"), "speculators_model_type": ("dflash", "dspark"),
               "attention_mode": ("gqa",), "attention_sink_bias": (False,), "use_swa": (False,)}


@dataclass(frozen=True)
class BlockConfig:
    """What the config of a head says. Which biases, embedding and lm_head there are, its tensors say.

    layer: of the head's layers. hidden_size is the target's, and so is vocab_size; all else is the head's own.
    layer.sliding_window is the one size that `windows` has, or None.
    """
    layer: Config
    target_size: int  # hidden size of the target
    target_layers: int
    taps: tuple[int, ...]  # boundaries (0: the embeddings, n: what the last layer leaves), ascending
    block_size: int  # rows of a block, the anchor's included
    mask_token: int  # the token of all rows but the anchor's, a row of the target's embedding
    anchor_first: bool  # row j drafts the token j + 1 after the anchor; False: the token j after it, and row 0 none
    causal: bool  # row j sees the rows up to j; False: it sees all rows
    windows: tuple[int | None, ...]  # of each layer: its sliding window in tokens; None: it sees everything
    draft_vocab_size: int  # tokens that are drafted
    markov: str | None  # one of MARKOV; None: no Markov head
    markov_rank: int  # 0 without


# ----- Reading -----------------------------------------------------------------------------------------------------


def read_block_config(folder: Path, found: Found, markov: str | None, rank: int, target: Config
                      ) -> tuple[BlockConfig, dict[str, tuple]]:
    """The config of the head in this folder, and its doubts: fields that the file cannot tell -> the values to try, the
    config's first. found, markov, rank: what the tensors say. Raises ValueError with one line for a config that
    contradicts the tensors, is of another target's head, or asks for what is not implemented."""
    with naming(folder / "config.json"):
        raw = flat(read_config(folder), NESTED)
        refuse_variants(raw)
        check_against_tensors(raw, found, markov, rank, target)
        of_blocks = (*CAUSAL, WINDOW_NOT_CAUSAL)  # of a whole model such flags would be refused
        layer = layer_config({key: value for key, value in raw.items() if key not in of_blocks}, found, target)
        windows = windows_of(raw, layer)
        block_size = positive(raw, "block_size")
        if not 2 <= block_size <= MAX_ROWS:
            raise ValueError(f"block_size {block_size} is not implemented: a block has 2 to {MAX_ROWS} rows")
        mask_token = read_mask_token(raw, target.vocab_size)
    with naming(folder / MEASURED):
        measured = read_measured(folder / MEASURED, found.taps, target.num_layers, ("anchor_first", "causal"), ())
    possible = {key: (value,) for key, value in measured.items()}
    with naming(folder / "config.json"):
        if "taps" not in possible:
            possible["taps"] = possible_taps(raw, found.taps, layer.num_layers, target.num_layers)
        if "anchor_first" not in possible:
            possible["anchor_first"] = possible_layouts(raw, markov)
        if "causal" not in possible:
            possible["causal"] = possible_causal(raw, windows)
    drafted = found.lm_head_rows or (found.d2t_rows if flag(raw, SHARED) else None) or target.vocab_size
    config = BlockConfig(layer, target.hidden_size, target.num_layers, block_size=block_size, mask_token=mask_token,
                         windows=windows, draft_vocab_size=drafted, markov=markov, markov_rank=rank,
                         **{key: values[0] for key, values in possible.items()})
    return config, {key: values for key, values in possible.items() if len(values) > 1}


def names_of(raw: dict) -> str:
    """All that a config calls its head, in small letters."""
    keys = ("architectures", "model_type", "speculators_model_type", "projector_type")
    return json.dumps([raw.get(key) for key in keys]).lower()


def refuse_variants(raw: dict) -> None:
    """ValueError for a config whose head computes something else."""
    for key, known in IMPLEMENTED.items():
        if raw.get(key, known[0]) not in known:
            raise ValueError(f"{key} {repr(raw[key])[:60]} is not implemented")
    if "gemma" in names_of(raw):
        raise ValueError("heads with Gemma's layers are not implemented")


def check_against_tensors(raw: dict, found: Found, markov: str | None, rank: int, target: Config) -> None:
    """ValueError where the config says one thing, and the tensors or the target another."""
    if found.width != target.hidden_size:
        raise ValueError(f"a head of width {found.width} for a target of hidden size {target.hidden_size}: adapters "
                         "between two widths are not implemented, or this is another model's head")
    if raw.get("num_target_layers", target.num_layers) != target.num_layers:
        raise ValueError(f"num_target_layers is {repr(raw['num_target_layers'])[:60]}, but the target has "
                         f"{target.num_layers}: another model's head")
    if flag(raw, SHARED) and (found.lm_head_rows or not found.d2t_rows):
        raise ValueError(f"{SHARED} is true, so the weights should have a d2t and no lm_head: download both again")
    if raw.get("markov_rank", rank) != rank:
        raise ValueError(f"markov_rank is {repr(raw['markov_rank'])[:60]}, but that of the weights is {rank}: download "
                         "both again")
    if markov and raw.get("markov_head_type", markov) != markov:
        raise ValueError(f"markov_head_type is {repr(raw['markov_head_type'])[:60]}, but the weights are those of "
                         f"{markov!r}: download both again")


def windows_of(raw: dict, layer: Config) -> tuple[int | None, ...]:
    """The sliding window of each layer, or None where it has none."""
    kinds, size = raw.get("layer_types"), layer.sliding_window
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layer.num_layers):
        raise ValueError(f"layer_types should be a list of {layer.num_layers}, one for each layer of the weights")
    if size is None:
        return (None,) * layer.num_layers
    if "sliding_window" not in raw:
        raise ValueError("sliding_window is missing, and there are sliding layers: ask the publisher")
    if kinds is not None:
        return tuple(size if kind == "sliding_attention" else None for kind in kinds)
    first = raw.get("max_window_layers", 28)  # as formats.config.read_window
    return tuple(size if i >= first else None for i in range(layer.num_layers))


def read_mask_token(raw: dict, vocab_size: int) -> int:
    if "mask_token_id" not in raw:
        raise ValueError("mask_token_id is missing, and nothing else tells it: ask the publisher")
    token = raw["mask_token_id"]
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(f"mask_token_id is {repr(token)[:60]}, but should be one of the {vocab_size} rows of the "
                         "target's embedding: another model's head, or the target lost rows that its tokenizer does "
                         "not use")
    return token


# ----- What files cannot tell --------------------------------------------------------------------------------------


def usual_outputs(count: int, num_layers: int) -> list[int]:
    """The layers whose outputs all publishers tap if a config says nothing."""
    if count == 1:
        return [num_layers // 2]
    return [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]


def possible_taps(raw: dict, count: int | None, own_layers: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """The possible taps (boundaries), likeliest first. count: how many taps fc takes; None if that is not known.
    own_layers: of the head; num_layers: of the target. Raises ValueError if no list of taps fits.

    speculators' aux_hidden_state_layer_ids are boundaries, and must be there. Others' target_layer_ids are outputs (-1:
    the embeddings), but some programs took them for boundaries. Without them there is a tap for each layer of the head.
    """
    key = "aux_hidden_state_layer_ids" if is_speculators(raw) else "target_layer_ids"
    ids = raw.get(key)
    if ids is None and is_speculators(raw):
        raise ValueError(f"{key} is missing, and nothing else tells the taps: ask the publisher")
    if ids is None:
        ids = usual_outputs(own_layers, num_layers)
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{key} should be a list of whole numbers, not {repr(ids)[:60]}")
    same = tuple(sorted(ids))
    candidates = [same] if is_speculators(raw) else [tuple(i + 1 for i in same), same]
    possible = tuple(taps for taps in candidates if taps and are_taps(taps, count, num_layers))
    if not possible:
        raise ValueError(f"taps {list(candidates[0])[:9]} do not fit a target of {num_layers} layers and an fc for "
                         f"{count or 'some'} of them: another model's head, or {key} is wrong or missing")
    return possible


def possible_layouts(raw: dict, markov: str | None) -> tuple[bool, ...]:
    """The possible values of anchor_first, likeliest first. DeepSpec writes no flag and has the anchor first, in its
    heads without Markov head too, which have the same architecture."""
    said = flag(raw, "sample_from_anchor", "shift_label")
    if said is not None:
        return (said,)
    likely = markov is not None or "dspark" in names_of(raw)
    return likely, not likely


def possible_causal(raw: dict, windows: tuple[int | None, ...]) -> tuple[bool, ...]:
    """The possible values of `causal`, likeliest first. Rows of a block do not see later rows in a sliding layer, if no
    flag says that they do."""
    said = flag(raw, *CAUSAL)
    if said is not None:
        return (said,)
    if not any(windows):
        return False, True
    if flag(raw, WINDOW_NOT_CAUSAL):
        return (False,)
    if not all(windows):
        raise ValueError("some layers have sliding windows, and some have not: rows of a block see later rows in the "
                         f"others only, which is not implemented. If they do in all or in none, add {CAUSAL[0]}")
    return True, False


# ----- Writing -----------------------------------------------------------------------------------------------------


def measured_json(cfg: BlockConfig) -> dict:
    """The measured.json of a head of which all is known."""
    return {"taps": list(cfg.taps), "anchor_first": cfg.anchor_first, "causal": cfg.causal}


def block_config_json(cfg: BlockConfig, attention_bias: bool, shared: bool) -> dict:
    """The config.json of a head as z-lab spells it, and SpecForge a Markov head, with all flags. shared: the head has
    a draft vocabulary and no lm_head, which only this project reads.

    The flag for causality stands there twice: vLLM reads NeMo's spelling, JetSpec its own.
    """
    layer = cfg.layer
    size = layer.sliding_window
    nested = {"mask_token_id": cfg.mask_token, "target_layer_ids": [boundary - 1 for boundary in cfg.taps],
              "sample_from_anchor": cfg.anchor_first, "causal_head": cfg.causal, "causal": cfg.causal}
    if cfg.markov:
        nested |= {"projector_type": "dspark", "markov_rank": cfg.markov_rank, "markov_head_type": cfg.markov,
                   "enable_confidence_head": False}
    return {"architectures": ["DSparkDraftModel" if cfg.markov else "DFlashDraftModel"], **sizes_json(layer),
            "num_target_layers": cfg.target_layers, "block_size": cfg.block_size, NESTED: nested,
            "draft_vocab_size": cfg.draft_vocab_size, "attention_bias": attention_bias,
            "layer_types": ["sliding_attention" if window else "full_attention" for window in cfg.windows],
            "sliding_window": size, "use_sliding_window": size is not None, **({SHARED: True} if shared else {})}
