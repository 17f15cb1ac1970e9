"""Engines of other projects in our process, for bench.py: transformers' generate, gpt-fast, and llama.cpp.

A decoder continues a prompt greedily and returns a timed Run. The other engine shares our weights where its layout
allows it, because a 13B may not fit on the GPU twice. llama.cpp has its own, in a GGUF file.
"""
import importlib.util
import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from app.answer import Run
from model import Llama
from quant.linear import is_quantized

Decoder = Callable[[list[int], int], Run]  # (prompt ids, max_new_tokens) -> Run


def layer_weights(model: Llama) -> list[dict[str, Tensor]]:
    """Each layer's weights, with q, k and v apart and gate and up apart. They are views, not copies. ValueError unless
    the model is a plain Llama."""
    cfg = model.cfg
    if cfg.qk_norm or model.layers[0].wqkv.bias is not None or is_quantized(model):
        raise ValueError("--transformers and --gpt_fast are for Llamas without query norms, biases and quantisation")
    if cfg.rotary_dim or cfg.nope_layers:
        raise ValueError("--transformers and --gpt_fast are for Llamas, whose RoPE rotates whole heads in all layers")
    rows = [n * cfg.head_dim for n in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
    layers = []
    for layer in model.layers:
        q, k, v = layer.wqkv.weight.split(rows)
        gate, up = layer.w13.weight.chunk(2)
        layers.append({"q": q, "k": k, "v": v, "o": layer.wo.weight, "gate": gate, "up": up, "down": layer.w2.weight,
                       "attn_norm": layer.attn_norm.weight, "mlp_norm": layer.mlp_norm.weight})
    return layers


def transformers_decoder(model: Llama, stop_ids: frozenset[int], cache: str) -> Decoder:
    """transformers' generate. cache: "dynamic" or "static". It does not time prefill, so each prompt runs twice:
    prefill is the time for one new token, and decoding is the time for all new tokens less that."""
    from transformers import LlamaConfig, LlamaForCausalLM
    cfg = model.cfg
    device = model.embed.weight.device
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim, rms_norm_eps=cfg.rms_norm_eps, max_position_embeddings=cfg.max_position_embeddings,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta,
                                                    **(cfg.rope_scaling or {})})
    tensors = {"model.embed_tokens": model.embed.weight, "model.norm": model.norm.weight,
               "lm_head": model.lm_head.weight}
    names = dict(q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
                 gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj", attn_norm="input_layernorm",
                 mlp_norm="post_attention_layernorm")
    for i, layer in enumerate(layer_weights(model)):
        tensors |= {f"model.layers.{i}.{names[name]}": weight for name, weight in layer.items()}
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config).requires_grad_(False).eval()
    theirs.load_state_dict({f"{name}.weight": tensor for name, tensor in tensors.items()}, assign=True)
    with device:  # RoPE's frequencies are not in the state dict, so they are still on the meta device
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    options = {"do_sample": False, "eos_token_id": sorted(stop_ids) or None, "pad_token_id": 0,
               "cache_implementation": cache}  # on a GPU, generate itself compiles the model for "static"

    def decode(ids: list[int], new_tokens: int) -> Run:
        prompt = torch.tensor([ids], device=device)
        seconds = []
        for n in (1, new_tokens):
            start = time.perf_counter()
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, **options)
            tokens = out[0, len(ids):].tolist()  # waits for the device
            seconds.append(time.perf_counter() - start)
        prefill_s, total_s = seconds
        return Run(tokens, [1] * (len(tokens) - 1), prefill_s, max(total_s - prefill_s, 1e-9))
    return decode


def gpt_fast_model(model: Llama, folder: Path) -> nn.Module:
    """gpt-fast's Transformer, from model.py in the clone `folder`, with our weights. Only wqkv is copied, because its
    rows change their order. ValueError for another commit, or a model that gpt-fast does not know."""
    spec = importlib.util.spec_from_file_location("gpt_fast_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the dataclass in model.py looks itself up there
    spec.loader.exec_module(module)
    cfg = model.cfg
    if len(inspect.signature(module.Transformer.forward).parameters) != 3:  # self, tokens, positions
        raise ValueError(f"--gpt_fast {folder}: model.py is of another version; check out its commit 32971d3")
    if cfg.rope_scaling or cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        raise ValueError("--gpt_fast needs a model without RoPE scaling, whose heads make up its hidden size")
    with torch.device("meta"):
        theirs = module.Transformer(module.ModelArgs(
            block_size=model.rope.shape[1], vocab_size=cfg.vocab_size, n_layer=cfg.num_layers, n_head=cfg.num_heads,
            dim=cfg.hidden_size, intermediate_size=cfg.intermediate_size, n_local_heads=cfg.num_kv_heads,
            rope_base=cfg.rope_theta, norm_eps=cfg.rms_norm_eps)).requires_grad_(False).eval()
    tensors = {"tok_embeddings": model.embed.weight, "output": model.lm_head.weight, "norm": model.norm.weight}
    for i, w in enumerate(layer_weights(model)):  # its RoPE rotates 2i with 2i + 1, ours i with i + D/2
        q, k = (w[x].unflatten(0, (-1, 2, cfg.head_dim // 2)).transpose(1, 2).flatten(0, 2) for x in "qk")
        tensors |= {f"layers.{i}.{name}": weight for name, weight in {
            "attention.wqkv": torch.cat((q, k, w["v"])), "attention.wo": w["o"], "attention_norm": w["attn_norm"],
            "ffn_norm": w["mlp_norm"], "feed_forward.w1": w["gate"], "feed_forward.w3": w["up"],
            "feed_forward.w2": w["down"]}.items()}
    theirs.load_state_dict({f"{name}.weight": tensor for name, tensor in tensors.items()}, assign=True)
    return theirs


def gpt_fast_decoder(model: Llama, stop_ids: frozenset[int], folder: Path) -> Decoder:
    """gpt-fast at commit 32971d3, decoding as its generate.py does: one compiled step, a cache as long as the text,
    attention left to Inductor. It does not stop at a stop id. All steps take the same time, so tokens after a stop id
    are not counted, and the time is reduced in proportion."""
    theirs = gpt_fast_model(model, folder)
    device = model.embed.weight.device

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        return theirs(tokens, positions)[:, -1].argmax(-1, keepdim=True)

    compiled_step = step
    if device.type == "cuda":
        torch._inductor.config.coordinate_descent_tuning = True
        compiled_step = torch.compile(step, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def decode(ids: list[int], new_tokens: int) -> Run:
        with torch.device(device):
            theirs.setup_caches(1, len(ids) + new_tokens)
            start = time.perf_counter()
            tokens = [step(torch.tensor([ids]), torch.arange(len(ids)))]
            position = torch.tensor([len(ids)])
        tokens[0].tolist()  # waits for the device
        decode_start = time.perf_counter()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for _ in range(new_tokens - 1):
                tokens.append(compiled_step(tokens[-1], position).clone())
                position += 1
        text = torch.cat(tokens, 1)[0].tolist()  # waits for the device
        seconds = time.perf_counter() - decode_start
        count = next((i for i, token in enumerate(text) if token in stop_ids), len(text) - 1)  # without prefill's token
        return Run(text[:count + 1], [1] * count, decode_start - start, seconds * count / max(new_tokens - 1, 1))
    return decode


def llamacpp_decoder(file: Path, slots: int) -> Decoder:
    """llama.cpp, by the package xllamacpp, on a CPU: plain decoding of a GGUF file with as many threads as we have. It
    is given ids and returns ids, and times prefill and decoding itself. ValueError where it cannot read the file."""
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = slots, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def decode(ids: list[int], new_tokens: int) -> Run:
        answer = server.handle_completions({
            "prompt": ids, "n_predict": new_tokens, "temperature": 0, "top_k": 1, "samplers": ["top_k"],
            "cache_prompt": False, "return_tokens": True, "verbose": True})
        if "error" in answer:
            raise ValueError(f"llama.cpp: {answer['error']}")
        times, tokens = answer["timings"], answer["__verbose"]["tokens"]
        if times["prompt_n"] != len(ids):
            raise ValueError(f"llama.cpp made {times['prompt_n']} tokens of a prompt of {len(ids)}")
        return Run(tokens, [1] * (len(tokens) - 1), times["prompt_ms"] / 1e3, max(times["predicted_ms"] / 1e3, 1e-9))
    return decode
