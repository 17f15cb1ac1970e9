"""Hugging Face folders: their names for tensors, and opening their weight files."""
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from formats.families import WRAPPERS, has_biases, llama_words
from formats.foreign import head_for_model, pickled_by, quantized_by_tensors
from formats.packed import Packed, is_read, join_parts, stated
from formats.tokenizer_files import read_json
from formats.weights import read_tensors

# Our module -> the Hugging Face modules whose rows it stacks, in this order.
NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "wqkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "w13": "mlp.gate_proj mlp.up_proj",
    "w2": "mlp.down_proj",
}
VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")  # what a text does without


class LazyTensor(NamedTuple):
    """A tensor's shape, a function that reads it and, if its file packs it, the packed tensors. Of a folder's packed
    weights shape is () and read is None, until quant.published.with_values fills them in."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor] | None
    packed: Packed | None = None


def hf_names(name: str, table: dict[str, str]) -> list[str]:
    """Hugging Face's names for the pieces of a tensor, by a table of modules such as NAMES: "layers.3.wqkv.bias" gives
    the biases of q_proj, k_proj and v_proj of model.layers.3. A name whose module is not in the table is returned as it
    is. GGUF's "blk.3.attn_q.bias" works the same way, with the table in formats/gguf.py.
    """
    *layer, module, kind = name.split(".")
    if module not in table:
        return [name]
    prefix = f"model.layers.{layer[-1]}." if layer else ""
    return [f"{prefix}{hf_module}.{kind}" for hf_module in table[module].split()]


def open_folder(folder: Path) -> dict[str, LazyTensor]:
    """The memory-mapped tensors of a Hugging Face folder, by Hugging Face's names. They are in one file, or in the
    shards that an index lists. Raises ValueError where a file is missing, damaged, or holds more than plain tensors,
    and where config.json and the tensors are of two models."""
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    path = next((folder / kind for kind in kinds if (folder / kind).is_file()), None)
    if path is None:
        raise ValueError(f"no weights; one of {', '.join(kinds)} should be there{what_is_there(folder)}")
    index = read_json(path)["weight_map"] if path.suffix == ".json" else {"": path.name}
    tensors = {}
    for file in sorted(set(map(str, index.values()))):
        if Path(file).name != file or not (folder / file).is_file():  # never a file outside the folder
            raise ValueError(f"{path}: names {file!r}, which is not a file of its folder; finish the download")
        if file.endswith(".bin") and (quantized := pickled_by(folder / file)):
            raise ValueError(quantized)
        found = read_tensors(folder / file)[0]
        if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
            raise ValueError(f"{folder / file}: holds other things than plain tensors; use a safetensors version")
        tensors |= {str(name): tensor for name, tensor in found.items()}
    raw = read_json(folder / "config.json")
    if raw.get("model_type") in list(WRAPPERS):
        tensors = text_tensors(tensors)
    raw = llama_words(raw)
    if kind := head_for_model(tensors, raw):
        raise ValueError(f"the folder holds {kind}, not a model: give the model's folder, and --eagle for an "
                         "EAGLE-1/2 head")
    found = stated(raw, folder)
    if found and is_read(*found[:2]):
        tensors = join_parts(tensors, *found[:2], has_biases(raw))
    if quantized := quantized_by_tensors({name: t for name, t in tensors.items() if isinstance(t, Tensor)}):
        raise ValueError(quantized)
    return usual_names({name: LazyTensor((), None, t) if isinstance(t, Packed) else LazyTensor(tuple(t.shape), t.detach)
                        for name, t in tensors.items()}, raw)


def text_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a model that sees images too the text model's tensors, by a Llama's names. In files these begin with
    "language_model.", or with "model.language_model." in place of "model."."""
    found = {}
    for name, tensor in tensors.items():
        if not VISION.match(name):
            found[name.replace("model.language_model.", "model.").removeprefix("language_model.")] = tensor
    return found


def what_is_there(folder: Path) -> str:
    """The end of an error about a folder without weights: what it holds instead, as far as names tell."""
    signs = {
        "gptq*.safetensors": "a GPTQ checkpoint of 2023; rename it to model.safetensors, beside its "
                             "quantize_config.json",
        "*[0-9]bit*.safetensors": "a quantised checkpoint; download the unquantised model",
        "qmodel.pt": "an HQQ checkpoint; download the unquantised model",
        "*.gguf": "a GGUF model; give the path of that file",
        "adapter_model.*": "a LoRA adapter; merge it into its base model first",
        "consolidated*": "the weights in Meta's or Mistral's own format; download the Hugging Face version",
        "medusa_lm_head.*": "Medusa heads; generate.py takes them with --medusa",
        "*.safetensors": "weights under another name; finish the download, or rename it to model.safetensors"}
    for pattern, what in signs.items():
        if file := min(folder.glob(pattern), default=None):
            return f". {file.name} is {what}"
    return ""


def usual_names(tensors: dict[str, LazyTensor], raw: dict) -> dict[str, LazyTensor]:
    """The tensors of a folder as a model with this config.json, in Llama's words, should have named them. transformers
    reads these too:

    - without "model." in front, saved from a LlamaModel rather than a LlamaForCausalLM
    - with tied embeddings, the one matrix under the lm_head's name alone

    Raises ValueError for biases that transformers ignores, and where no tensor can be the lm_head."""
    if "embed_tokens.weight" in tensors or "layers.0.self_attn.q_proj.weight" in tensors:
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in tensors.items()}
    embedding, lm_head = (f"{NAMES[module]}.weight" for module in ("embed", "lm_head"))
    if raw.get("tie_word_embeddings") and embedding not in tensors and lm_head in tensors:
        tensors[embedding] = tensors.pop(lm_head)
    if not raw.get("tie_word_embeddings") and embedding in tensors and lm_head not in tensors:
        raise ValueError(f"config.json does not fit the weights: missing {lm_head}; if the model uses its embedding "
                         "instead, set \"tie_word_embeddings\": true in config.json")
    # transformers gives q, k and v biases in few families without one for the output (Family.biases).
    bias = next((name for name in tensors if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))), None)
    if bias and not has_biases(raw):
        raise ValueError(f"{bias} is there, but transformers ignores it in a {raw['model_type']} model: remove the "
                         "biases, or, if they belong to it, call it a Qwen2 in config.json (\"model_type\": \"qwen2\", "
                         "\"architectures\": [\"Qwen2ForCausalLM\"])")
    return tensors
