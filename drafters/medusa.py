"""Medusa (arXiv 2401.10774): heads that read one feature of the target and guess several tokens ahead, all at once.

    python generate.py --checkpoint checkpoints/lmsys/vicuna-7b-v1.3 --medusa DIR --prompt "Hello!"

Every head reads the same feature: the target's last hidden state after the final norm, from which the newest token was
chosen. Head k (from 0) is one or more blocks x + silu(W x + b) and a projection to the vocabulary. It guesses the token
k + 2 positions after the feature's own token, which is k + 1 levels below the root.

No head sees what another one guessed. So a tree costs one row of each head, all nodes of a level have the same possible
children, and the tree's shape, which combines the heads' ranks, is fixed in advance.

  V1   each head has its own projection, as large as the lm_head
  V2   all heads share the target's lm_head: they are blocks only, and one product gives the logits of all heads
"""
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from draft import Drafter, tree_ops
from formats.medusa import FILES, PROJECTION, arrange, common_name, open_heads, shares_lm_head
from formats.weights import fill, save_tensors
from formats.writing import replace_files
from model import Llama
from ops.linear import linear
from quant.linear import drafting_rows
from tree import MAX_NODES, State, Tree, fixed_tree, root_token
from tree import Path as TreePath

# The authors' tree `mc_sim_7b_63` (github.com/FasterDecoding/Medusa, medusa/model/medusa_choices.py): how many of the
# next head's best tokens are the children of each node. A node is its path of ranks: (0, 1) is the first head's best
# token, then the second head's second-best. 63 drafted nodes; level by level 10, 28, 23 and 2.
CHILDREN = {(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, **{(rank,): 1 for rank in range(4, 10)},
            (0, 0): 10, (0, 1): 3, (0, 2): 2, **{(0, rank): 1 for rank in range(3, 8)}, (1, 0): 2, (2, 0): 1,
            (0, 0, 0): 2}
MEDUSA_TREE = [(*path, rank) for path, count in CHILDREN.items() for rank in range(count)]


# ----- The heads ---------------------------------------------------------------------------------------------------


class MedusaHeads(nn.Module):
    """`num_layers` blocks for each head and, with a `vocab_size` (V1), a projection for each head. Untrained heads are
    all zeros: each returns the feature unchanged."""

    def __init__(self, hidden_size: int, num_heads: int, num_layers: int = 1, vocab_size: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_heads, hidden_size))
        self.projections = None if vocab_size is None else nn.Parameter(torch.zeros(num_heads, vocab_size, hidden_size))

    def forward(self, features: Tensor, count: int | None = None) -> Tensor:
        """What each head's last block returns, [heads, ..., C] of features [..., C]: the input of the lm_head, or of
        the head's own projection. count: run only the first `count` heads."""
        count = count or self.weight.shape[1]
        x = features.expand(count, *features.shape)
        for layer, (weight, bias) in enumerate(zip(self.weight[:, :count], self.bias[:, :count])):
            if layer == 0:  # all heads read the same rows: their matrices, one below the other, are one matrix
                y = linear(features, weight.flatten(0, 1), bias.flatten()).unflatten(-1, (count, -1)).movedim(-2, 0)
            else:
                rows = x.reshape(count, -1, x.shape[-1])
                y = torch.baddbmm(bias[:, None], rows, weight.mT).view(x.shape)
            x = x + F.silu(y)
        return x


def save_medusa(heads: MedusaHeads, folder: Path | str) -> None:
    """Write heads as TGI reads them: medusa_lm_head.safetensors, and a config.json whose version says whether the heads
    share the lm_head (V2)."""
    folder = Path(folder)
    layers, count = heads.weight.shape[:2]
    tensors = {f"{head}.{layer}.linear.{kind}": t[layer, head] for head in range(count) for layer in range(layers)
               for kind, t in (("weight", heads.weight), ("bias", heads.bias))}
    if heads.projections is not None:
        tensors |= {f"{head}.{layers}.weight": t for head, t in enumerate(heads.projections)}
    config = {"version": "2" if heads.projections is None else "1", "medusa_num_heads": count,
              "medusa_num_layers": layers, "base_model_name_or_path": ""}
    with replace_files(folder) as part:
        save_tensors(part / FILES[0], {name: t.detach().contiguous() for name, t in tensors.items()}, {"format": "pt"})
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_medusa(path: Path | str, target: Llama) -> MedusaHeads:
    """Load published heads: a folder with a file in one of three layouts (formats/medusa.py), or that file.

    The tensors decide how many heads and blocks there are, since the authors' configs have it wrong. config.json, if
    there is one, decides one thing: whether the heads share the lm_head although the file has projections. Where all
    layers of a head share one block, it is loaded once for each layer.

    Raises FileNotFoundError, or ValueError if the file is damaged, of another kind, or for another model.
    """
    path = Path(path)
    weight = target.embed.weight
    file, published = open_heads(path)
    if shares_lm_head(file.parent / "config.json"):
        published = {name: tensor for name, tensor in published.items() if not PROJECTION.fullmatch(common_name(name))}
    tensors = arrange(file, published, target.cfg.hidden_size, target.cfg.vocab_size)
    layers, count, size, _ = tensors["weight"].shape
    with torch.device("meta"):
        heads = MedusaHeads(size, count, layers, target.cfg.vocab_size if "projections" in tensors else None)
    fill(heads, tensors, file, weight.device, weight.dtype)
    return heads


# ----- Drafting with them ------------------------------------------------------------------------------------------


class Medusa(Drafter):
    """A fixed tree, filled in by the heads. `choices`: the paths of ranks to its nodes. Levels without a head are left
    out, and heads without a level are not run. ValueError for too many nodes or ranks, or a path without its parent."""

    def __init__(self, heads: MedusaHeads, target: Llama, choices: list[TreePath] = MEDUSA_TREE) -> None:
        device = target.embed.weight.device
        num_heads = heads.weight.shape[1]
        nodes, self.tree = fixed_tree([path for path in choices if len(path) <= num_heads], device)
        self.num_nodes = len(nodes)
        self.max_depth = len(nodes[-1])
        self.ranks = 1 + max(path[-1] for path in nodes[1:])  # how many best tokens of each head the tree uses
        most_ranks = min(10, target.cfg.vocab_size)
        if self.num_nodes > MAX_NODES or self.ranks > most_ranks:
            raise ValueError(f"a tree of {self.num_nodes} nodes and the best {self.ranks} tokens: at most {MAX_NODES} "
                             f"nodes and the best {most_ranks} tokens are possible")
        self.heads = heads
        self.lm_head = drafting_rows(target.lm_head.weight, None, False)
        self.tree_ops = tree_ops(device)
        # Each drafted node's place in the heads' best tokens [max_depth, ranks], flattened
        self.best_index = torch.tensor([(len(path) - 1) * self.ranks + path[-1] for path in nodes[1:]], device=device)

    def propose(self, state: State) -> Tree:
        feature = state.hidden.index_select(0, (state.committed - 1)[None])  # the root was chosen from it
        best = self.tree_ops.best_tokens(self.logits(feature, state), self.ranks)
        return self.tree._replace(tokens=torch.cat((root_token(state), best.flatten()[self.best_index])))

    def logits(self, feature: Tensor, state: State) -> Tensor:
        """The logits of each head for its own level, [max_depth, V] fp32, of the target's feature [1, C].

        When sampling, the noise that the target will choose with is added. It is known in advance: with it, the heads
        guess what will be sampled, not what might be."""
        hidden = self.heads(feature, self.max_depth)[:, 0]
        projections = self.heads.projections
        if projections is None:
            logits = linear(hidden, self.lm_head, dtype=torch.float32)
        else:
            logits = torch.cat([linear(row, weight, dtype=torch.float32)
                                for row, weight in zip(hidden.split(1), projections)])
        return logits if state.noise is None else logits + state.noise[:self.max_depth]
