"""Damaged files of a checkpoint, each given to the function that reads it: it works, or says in one line why not.

The other parts are loaded once, so that a case takes milliseconds. test_corrupt.py goes through the whole of
generate.py instead, with fewer cases.

    python -m pytest tests/formats/test_fuzz_loaders.py
"""
import json
import random
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from damage import damaged_json, damaged_safetensors, damaged_template, flipped, fuzz
from safetensors.torch import save_file
from tiny_sources import sentencepiece_model, tiktoken_model

from draft import Eagle2
from drafters.heads import load_head
from drafters.medusa import Medusa, load_medusa
from drafters.methods import load_checked_draft_model
from drafters.tree_size import read_curve
from formats.weights import FORMAT
from model import Llama, load_model
from quant.linear import quantize_linears
from tokenizer import Tokenizer

# Entries that the files of the tiny folder lack, to be set too.
MODEL_KEYS = ("rope_scaling", "rope_parameters", "sliding_window", "layer_types", "quantization_config",
              "architectures", "hidden_act", "attention_bias", "logit_scale")
TOKENIZER_KEYS = ("truncation", "padding", "normalizer", "post_processor")
CONFIG_KEYS = ("added_tokens_decoder", "additional_special_tokens", "tokenizer_class", "unk_token", "add_bos_token",
               "add_prefix_space", "legacy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_everything(tmp_path_factory.mktemp("fuzz") / "model")


@pytest.fixture(scope="module")
def target(folder: Path) -> Llama:
    return load_model(folder)


# ----- The model and its drafters ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_model(folder: Path) -> None:
    """Fails if load_model cannot cope with a config.json, or with a weight file, plain or quantised."""
    fuzz(folder / "config.json", 80, partial(damaged_json, more_keys=MODEL_KEYS), load_model, folder)
    fuzz(folder / "model.safetensors", 80, damaged_safetensors, load_model, folder)
    for mode, group in (("int8", 128), ("int8dyn", 128), ("int4", 64), ("int4", 128)):
        model = load_model(folder)
        quantize_linears(model, mode, group)
        file = folder / f"model-{mode}.safetensors"
        save_file(model.state_dict(), file, {"format": FORMAT, "mode": mode, "group": str(group)})
        fuzz(file, 40, damaged_safetensors, load_model, file)


@pytest.mark.slow
def test_eagle_head(folder: Path, target: Llama) -> None:
    """Fails if load_head, or what drafting prepares, cannot cope with a file of a head, plain, pickled or quantised."""
    def load(path: Path) -> None:
        Eagle2(load_head(path, target), target, 8, 2, 4)

    eagle, pickled = folder / "eagle", folder / "eagle_pickle"
    fuzz(eagle / "config.json", 50, partial(damaged_json, more_keys=MODEL_KEYS), load, eagle)
    fuzz(eagle / "model.safetensors", 80, damaged_safetensors, load, eagle)
    fuzz(eagle / "draft_vocab.json", 40, damaged_json, load, eagle)
    fuzz(eagle / "acceptance.json", 40, damaged_json, read_curve, eagle)
    fuzz(pickled / "pytorch_model.bin", 60, flipped, load, pickled)
    for mode in ("int8dyn", "int4"):
        head = load_head(eagle, target, 0)
        head.quantize(mode)
        file = eagle / f"model-{mode}.safetensors"
        tensors = {name: t.contiguous() for name, t in head.state_dict().items()}
        save_file(tensors, file, {"mode": mode, "group": "128"})
        fuzz(file, 40, damaged_safetensors, load, file)


@pytest.mark.slow
def test_medusa_heads(folder: Path, target: Llama) -> None:
    """Fails if load_medusa cannot cope with a file of Medusa heads."""
    def load(path: Path) -> None:
        Medusa(load_medusa(path, target), target)

    medusa, pickled = folder / "medusa", folder / "medusa_pickle"
    fuzz(medusa / "config.json", 30, partial(damaged_json, more_keys=("original_lm_head",)), load, medusa)
    fuzz(medusa / "medusa_lm_head.safetensors", 80, damaged_safetensors, load, medusa)
    fuzz(pickled / "medusa_lm_head.pt", 60, flipped, load, pickled)


@pytest.mark.slow
def test_draft_model(folder: Path, target: Llama) -> None:
    """Fails if a draft model's files are not refused cleanly: those of a whole model, and those of layers alone that
    share the target's embedding."""
    def load(path: Path) -> None:
        load_checked_draft_model(Namespace(speculate=path, checkpoint=folder), target)

    draft = folder / "draft"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        fuzz(draft / name, 20, damaged_json, load, draft)
    fuzz(draft / "model.safetensors", 30, damaged_safetensors, load, draft)
    for metadata in ({}, {"mode": "int8"}):
        model = load_model(draft)
        if metadata:
            quantize_linears(model.layers, "int8")
        layers = {name: t for name, t in model.state_dict().items() if name.startswith(("layers", "norm"))}
        file = draft / "layers.safetensors"
        save_file(layers, file, {"format": FORMAT, "embedding": "target"} | metadata)
        fuzz(file, 50, damaged_safetensors, load, file)


# ----- The tokenizer -----------------------------------------------------------------------------------------------


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    ids = tokenizer.dialogue(["Hi <|end|>", "yes\n", "the cat \u00e9"])
    tokenizer.decode([*ids, *range(0, 300, 7), 10**6])


@pytest.mark.slow
def test_tokenizer(folder: Path) -> None:
    """Fails if reading or using a tokenizer cannot cope with one of its files, the template, or the ids in a config."""
    for name, cases, keys in (("tokenizer.json", 100, TOKENIZER_KEYS), ("tokenizer_config.json", 80, CONFIG_KEYS),
                              ("generation_config.json", 30, ()), ("config.json", 30, ("bos_token_id",))):
        fuzz(folder / name, cases, partial(damaged_json, more_keys=keys), use_tokenizer, folder)
    template = folder / "chat_template.jinja"
    template.write_text("{% macro say(text) %}{{ text.strip() ~ '\n' }}{% endmacro %}"
                        "{%- for m in messages %}{{ m['role'] | upper + ': ' }}"
                        "{% if loop.first and tools is none %}{{ say(m.content) }}{% endif %}"
                        "{{ eos_token }}{% endfor %}{% set ns = namespace(x=[1, 2]) %}{% set ns.x = ns.x + [3] %}"
                        "{% if add_generation_prompt %}assistant {{ ns.x | join(',') * 2 }}{% endif %}")
    fuzz(template, 120, damaged_template, use_tokenizer, folder)
    template.unlink()


# Parts that a tokenizer.json may have, and that the tiny one lacks.
PARTS = {
    "normalizer": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "NFC"}, {"type": "Nmt"},
                   {"type": "Replace", "pattern": {"String": ""}, "content": "xy"}, {"type": "Prepend", "prepend": ""},
                   {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}],
    "pre_tokenizer": [None, {"type": "FixedLength", "length": 0}, {"type": "Digits", "individual_digits": True},
                      {"type": "Split", "pattern": {"Regex": ""}, "behavior": "MergedWithNext", "invert": True},
                      {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}],
    "decoder": [None, {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
                {"type": "Strip", "content": " ", "start": 99, "stop": 99}, {"type": "WordPiece", "prefix": "##"}],
    "post_processor": [{"type": "BertProcessing", "sep": ["<|end|>", 257], "cls": ["x", 2**31]},
                       {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
                       {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                        "pair": [], "special_tokens": {"x": {"id": "x", "ids": [2**31], "tokens": ["x"]}}}],
    "truncation": [{"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}],
    "padding": [{"strategy": {"Fixed": 10**6}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": ""}],
    "added_tokens": [[], [{"id": 256, "content": "", "special": True}], [{"id": 2**32 - 1, "content": "x"}]]}
MODEL_PARTS = {"unk_token": ["<|start|>", "nope", ""], "continuing_subword_prefix": ["##"], "merges": [["a b"], ["a"]],
               "end_of_word_suffix": ["</w>"], "byte_fallback": [True], "fuse_unk": [True], "dropout": [1.0],
               "vocab": [{}, {"a": 0}, {"a": 2**31}], "type": ["WordLevel", "WordPiece", "Unigram"]}


@pytest.mark.slow
def test_tokenizer_parts(folder: Path) -> None:
    """Fails if a tokenizer.json of parts that do not fit together raises anything else, when it is read or used:
    `tokenizers` may panic, and may find only while it encodes that a token is missing."""
    def damage(data: bytes, draw: random.Random) -> bytes:
        value = json.loads(data)
        for parts, place in ((PARTS, value), (MODEL_PARTS, value["model"])):
            for part in draw.sample([*parts], draw.choice((0, 1, 1, 2))):
                place[part] = draw.choice(parts[part])
        for token in value["added_tokens"]:
            token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return json.dumps(value).encode()

    fuzz(folder / "tokenizer.json", 200, damage, use_tokenizer, folder)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sentencepiece_model, tiktoken_model])
def test_tokenizer_model(make: Callable[[], bytes], tmp_path: Path) -> None:
    """Fails if a tokenizer.model, sentencepiece's or tiktoken's, or a file beside it is not refused cleanly."""
    (tmp_path / "tokenizer.model").write_bytes(make())
    for name, text in (("config.json", "{}"), ("added_tokens.json", '{"<|pad|>": 600, "<|x|>": 601}'),
                       ("tokenizer_config.json", '{"add_bos_token": true, "add_eos_token": false, "legacy": false}'),
                       ("special_tokens_map.json", '{"bos_token": {"content": "<s>"}, "pad_token": "<|pad|>"}')):
        (tmp_path / name).write_text(text)
    fuzz(tmp_path / "tokenizer.model", 60, flipped, use_tokenizer, tmp_path)
    for name in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        fuzz(tmp_path / name, 30, partial(damaged_json, more_keys=CONFIG_KEYS), use_tokenizer, tmp_path)
