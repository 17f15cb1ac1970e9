"""The EAGLE draft head and the two ways of growing a tree with it.

The head (arXiv 2401.15077) guesses the target's next *feature*, its last hidden state after the final norm,
from the present one and the token that followed it: fc([embedding(t_{i+1}); f_i]), then one decoder layer
without an input norm. The target's own lm_head turns the guess into tokens. Entry i of the head pairs
feature i with token i + 1 and takes RoPE position i, the feature's place, not the token's: off by one here
costs no correctness, only acceptance, which is why acceptance has tests of its own.

  Eagle2   grows the tree where the head is confident (arXiv 2406.16858)
  Eagle1   fills a fixed tree

A drafter has `num_nodes`, `max_depth`, `prefill(...)` once a prompt and `propose(state) -> Tree` once a cycle.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from model import Config, Layer, Llama, fill, read_tensors, rope_table
from tree import MAX_NODES, Tree, best_children, best_first, build, causal_mask, rerank, tree_mask

# The EAGLE authors' fixed tree `mc_sim_7b_63` (their repository, eagle/model/choices.py): 25 drafted nodes,
# each the path of ranks that leads to it. (0, 1) is the second-best token after the best one.
EAGLE1_TREE = [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0),
               (0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 0, 0),
               (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 0, 2), (0, 0, 0, 0, 0), (0, 0, 0, 0, 1)]


@dataclass
class State:
    """One sequence being decoded, all of it on the device. Only `width` is a Python number: how many cache
    slots attention looks at, a bound on everything this cycle touches."""
    tokens: Tensor  # [S] int64, committed up to `length`; tokens[length - 1] is the root, not yet in the KV cache
    length: Tensor  # 0-d int64
    features: Tensor  # [max_depth + 1, C], the target's features of the places before the tokens just committed
    committed: Tensor  # 0-d int64, how many tokens the last cycle committed; that many rows of `features` count
    done: Tensor  # 0-d bool: a stop id or the length limit was reached, further cycles change nothing
    width: int


class EagleHead(nn.Module):
    """fc and one decoder layer, with its own KV cache. Shapes come from the head's own config."""

    def __init__(self, cfg: Config, *, fc_bias: bool = False, qkv_bias: bool = False) -> None:
        super().__init__()
        self.cfg = cfg
        self.fc = nn.Linear(2 * cfg.hidden_size, cfg.hidden_size, bias=fc_bias)
        self.layer = Layer(cfg, qkv_bias=qkv_bias, norm_input=False)
        self.kv = self.rope = None

    def allocate_cache(self, slots: int) -> None:
        """Sized by the engine's context, never by the head's config: published heads say 2048."""
        cfg, like = self.cfg, self.fc.weight
        if self.kv is not None and self.kv.shape[3] >= slots:
            return  # engines may share a head, as they share a model
        self.kv = like.new_zeros(2, 1, cfg.num_kv_heads, slots, cfg.head_dim)
        self.rope = rope_table(cfg, slots, like.device).to(like.dtype)

    def forward(self, embedding: Tensor, features: Tensor, rope_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | None = None) -> Tensor:
        """embedding, features [B, T, C]; the rest as in Llama.forward. Returns predicted features [B, T, C]."""
        x = self.fc(torch.cat((embedding, features), dim=-1))
        return self.layer(x, self.rope[:, rope_pos], None if cache_pos is None else self.kv, cache_pos, mask)


def load_head(folder: Path | str, target: Llama) -> EagleHead:
    """An EAGLE-1/2 head as published: config.json and model.safetensors or pytorch_model.bin.

    The file decides whether there are biases (configs have been wrong); its copy of the embedding is ignored.
    Raises FileNotFoundError, or ValueError where the head is damaged, of another kind, or of another model.
    """
    folder, weight = Path(folder), target.embed.weight
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no draft head there; fetch one with `convert_hf_checkpoint.py ... "
                                "--eagle ID`, train one with train.py, or name its folder with --draft")
    cfg = Config.load(folder, model_type="llama")
    path = next((p for p in (folder / "model.safetensors", folder / "pytorch_model.bin") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
    published, _ = read_tensors(path)
    if any(name.startswith("midlayer.") or name == "d2t" for name in published):
        raise ValueError(f"{path}: this is an EAGLE-3 head; only EAGLE-1/2 heads are implemented")
    if cfg.hidden_size != target.cfg.hidden_size or cfg.vocab_size != target.cfg.vocab_size or (
            "embed_tokens.weight" in published and published["embed_tokens.weight"].shape != weight.shape):
        raise ValueError(f"{folder}: a head for hidden size {cfg.hidden_size} and {cfg.vocab_size} tokens, but the "
                         f"target has {target.cfg.hidden_size} and {target.cfg.vocab_size}: another model's")
    tensors = native_names(published, path)
    with torch.device("meta"):
        head = EagleHead(cfg, fc_bias="fc.bias" in tensors, qkv_bias="layer.wqkv.bias" in tensors)
    fill(head, tensors, path, weight.device, weight.dtype)
    return head


def native_names(published: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Published tensors under this file's names, q/k/v and gate/up fused. The names we do not know stay, and
    `fill` refuses them."""
    tensors = {name: t for name, t in published.items()
               if name != "embed_tokens.weight" and not name.endswith("rotary_emb.inv_freq")}
    fused = {"layer.wqkv.weight": [f"layers.0.self_attn.{x}_proj.weight" for x in "qkv"],
             "layer.wqkv.bias": [f"layers.0.self_attn.{x}_proj.bias" for x in "qkv"],
             "layer.wo.weight": ["layers.0.self_attn.o_proj.weight"],
             "layer.mlp_norm.weight": ["layers.0.post_attention_layernorm.weight"],
             "layer.w13.weight": ["layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"],
             "layer.w2.weight": ["layers.0.mlp.down_proj.weight"]}
    for name, parts in fused.items():
        found = [tensors.pop(part) for part in parts if part in tensors]
        if len({t.shape[1:] for t in found}) > 1 or len(found) not in (0, len(parts)):
            raise ValueError(f"{path}: {', '.join(parts)} do not fit together")
        if found:
            tensors[name] = torch.cat(found) if len(found) > 1 else found[0]
    return tensors


class Eagle:
    """What both drafters share: the head's prefill, its catch-up on accepted tokens, and its scratch rows."""
    num_nodes: int
    max_depth: int
    scratch: int  # cache slots that the drafted nodes fed to the head take

    def __init__(self, head: EagleHead, target: Llama) -> None:
        self.head, self.embed, self.lm_head = head, target.embed, target.lm_head

    def prefill(self, tokens: Tensor, features: Tensor, first: int) -> None:
        """Feed entries first, first + 1, ...: features [T, C] of those places, tokens [T] of the next places."""
        slots = torch.arange(first, first + len(tokens), device=tokens.device)
        self.rows(tokens, features, slots, slots, causal_mask(first, len(tokens), first + len(tokens), tokens.device))

    def rows(self, tokens: Tensor, features: Tensor, rope_pos: Tensor, cache_pos: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.embed(tokens)[None], features[None], rope_pos, cache_pos, mask)[0]

    def extend(self, state: State) -> Tensor:
        """Re-run the head over the tokens just committed, now with the target's true features, replacing what
        drafting left there. Always max_depth + 1 rows; the spare ones lie past every slot that is read.
        Returns the feature [1, C] predicted for the root."""
        first = state.length - 1 - state.committed
        slots = first + torch.arange(self.max_depth + 1, device=first.device)
        mask = causal_mask(first, self.max_depth + 1, state.width, first.device)
        hidden = self.rows(state.tokens[slots + 1], state.features, slots, slots, mask)
        return hidden.index_select(0, (state.committed - 1)[None])

    def level(self, state: State, tokens: Tensor, features: Tensor, depth: int, used: int, sees: Tensor) -> Tensor:
        """Feed drafted nodes of one depth (1: the root's children): tokens [N], features [N, C] predicted for
        their parents, sees [N, scratch]: which scratch slots each attends to; `used` of these are taken."""
        base = state.length - 1
        slots = base + used + torch.arange(len(tokens), device=base.device)
        rope_pos = (base + depth - 1).expand(len(tokens))  # siblings share a place, never a slot
        return self.rows(tokens, features, rope_pos, slots, tree_mask(sees, base, state.width))

    def root(self, state: State) -> Tensor:
        return state.tokens.index_select(0, (state.length - 1)[None])[0]


class Eagle2(Eagle):
    """EAGLE-2's dynamic tree. `draft_tokens` counts the root; `draft_depth` levels of drafted tokens; each of
    the `topk` nodes of a level is given its `topk` best continuations, of all of which the best `topk` go on."""

    def __init__(self, head: EagleHead, target: Llama, draft_tokens: int = 60, draft_depth: int = 6,
                 topk: int = 10) -> None:
        super().__init__(head, target)
        if not (2 <= draft_tokens <= MAX_NODES and 1 <= draft_depth <= 8 and 1 <= topk <= 10):
            raise ValueError(f"a tree takes 2-{MAX_NODES} --draft_tokens, 1-8 --draft_depth and 1-10 --draft_topk")
        self.topk, self.max_depth = topk, draft_depth
        self.num_nodes = min(draft_tokens, 1 + topk + (draft_depth - 1) * topk * topk)  # no more than candidates
        self.scratch = max((draft_depth - 1) * topk, 1)

    def propose(self, state: State) -> Tree:
        k, device = self.topk, state.tokens.device
        hidden = self.extend(state)
        tokens, scores = best_children(self.lm_head(hidden), torch.zeros(1, device=device), k)  # [1, k]
        candidates = [(tokens[0], scores[0], torch.full((k,), -1, device=device))]  # tokens, scores, parents
        tokens, scores, index = tokens[0], scores[0], torch.arange(k, device=device)  # the nodes to feed next
        features = hidden.expand(k, -1)
        sees = torch.zeros(k, self.scratch, dtype=torch.bool, device=device)
        own = torch.eye(k, dtype=torch.bool, device=device)
        for depth in range(1, self.max_depth):
            used = (depth - 1) * k
            sees = torch.cat((sees[:, :used], own, sees[:, used + k:]), dim=1)
            hidden = self.level(state, tokens, features, depth, used, sees)
            tokens, scores = (x.flatten() for x in best_children(self.lm_head(hidden), scores, k))  # [k * k]
            candidates.append((tokens, scores, index.repeat_interleave(k)))
            best = best_first(scores, k)
            index = k + (depth - 1) * k * k + best
            tokens, scores, features, sees = tokens[best], scores[best], hidden[best // k], sees[best // k]
        tokens, scores, parents = (torch.cat(x) for x in zip(*candidates))
        return rerank(self.root(state), tokens, parents, scores, self.num_nodes - 1, self.max_depth)


class Eagle1(Eagle):
    """EAGLE's fixed tree: which nodes exist and which are fed is known in advance, only the tokens are not."""

    def __init__(self, head: EagleHead, target: Llama, choices: list[tuple[int, ...]] = EAGLE1_TREE) -> None:
        super().__init__(head, target)
        device = target.embed.weight.device
        nodes = sorted([(), *choices], key=lambda path: (len(path), path))  # level order, the root first
        self.num_nodes, self.max_depth = len(nodes), len(nodes[-1])
        parents = torch.tensor([0] + [nodes.index(path[:-1]) for path in nodes[1:]], device=device)
        self.shape = build(torch.zeros_like(parents), parents, self.max_depth)
        fed = [path for path in nodes[1:] if any(c[:-1] == path for c in choices)]  # in scratch-slot order
        self.scratch = max(len(fed), 1)
        self.levels = []  # for each depth of fed nodes: their tensors, see `propose`
        self.grow = [self.places([c for c in nodes if len(c) == 1], [()], device)]
        for depth in range(1, self.max_depth):
            here = [path for path in fed if len(path) == depth]
            above = [path for path in fed if len(path) == depth - 1] or [()]
            at_depth = [path for path in nodes if len(path) == depth]
            self.levels.append((
                torch.tensor([at_depth.index(path) for path in here], device=device),
                torch.tensor([above.index(path[:-1]) for path in here], device=device),
                torch.tensor([[path[:len(other)] == other for other in fed] for path in here], device=device),
                fed.index(here[0])))
            self.grow.append(self.places([c for c in nodes if len(c) == depth + 1], here, device))

    @staticmethod
    def places(children: list[tuple[int, ...]], fed: list[tuple[int, ...]], device: torch.device) -> Tensor:
        """[2, children]: the row of each child's parent among the fed nodes, and the child's rank."""
        return torch.tensor([[fed.index(c[:-1]) for c in children], [c[-1] for c in children]], device=device)

    def propose(self, state: State) -> Tree:
        hidden = self.extend(state)
        levels = [self.children(hidden, self.grow[0])]
        for depth, (fed, parent_rows, sees, used) in enumerate(self.levels, 1):
            hidden = self.level(state, levels[-1][fed], hidden[parent_rows], depth, used, sees)
            levels.append(self.children(hidden, self.grow[depth]))
        return self.shape._replace(tokens=torch.cat((self.root(state)[None], *levels)))

    def children(self, hidden: Tensor, places: Tensor) -> Tensor:
        logits = self.lm_head(hidden)
        return logits.topk(min(10, logits.shape[-1])).indices[places[0], places[1]]
