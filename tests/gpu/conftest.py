"""What the GPU tests share: engines of all kinds on the demo model, the weights of its methods, and how many kernels
Triton has compiled."""
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT

from app.options import Engine
from draft import Eagle2, Vanilla
from drafters.eagle1 import Eagle1
from drafters.heads import load_head
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup, Retrieval
from drafters.medusa import Medusa, MedusaHeads
from drafters.methods import METHODS
from drafters.speculate import Speculate
from formats.config import Config
from formats.eagle3_config import usual_taps
from model import Llama, load_model


@pytest.fixture(scope="session")
def engines(demo) -> list[Engine]:
    """An engine for every drafter, vanilla first, all with the demo model in fp32 without TF32: rounding then decides
    nothing on the demo prompts."""
    assert not torch.backends.cuda.matmul.allow_tf32
    model = load_model(demo, "cuda", torch.float32)
    head = load_head(demo / "eagle", model)
    draft = load_model(demo, "cuda", torch.float32)
    draft.layers = draft.layers[:2]
    heads = MedusaHeads(model.cfg.hidden_size, 4).cuda().requires_grad_(False)
    drafters = [
        Vanilla("cuda"), Eagle1(head, model), Eagle2(head, model), Eagle2(head, model, 24, 8, 3),
        Eagle2(head, model, retrieval=Retrieval(10, device="cuda")), Lookup("cuda"), Lookahead(model),
        Medusa(heads, model), Speculate(draft, model),
        Speculate(draft, model, 8, retrieval=Retrieval(4, device="cuda"))]
    return [Engine(model, drafter, 3200, frozenset([2])) for drafter in drafters]


@pytest.fixture(scope="session")
def weights_of(demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """For each method the option that names its weights: those of this repository, the head in the checkpoint where
    nothing is named, and for EAGLE-3 and block drafting a random head, of which few drafts are accepted."""
    heads, folder = ROOT / "heads/SmolLM2-135M-Instruct", tmp_path_factory.mktemp("heads")
    cfg = Config.load(demo)
    with torch.device("meta"):
        target = Llama(cfg)
    head = tiny.head3(target, taps=usual_taps(cfg.num_layers), num_attention_heads=cfg.num_heads,
                      num_key_value_heads=cfg.num_kv_heads)
    tiny.save_head3(head, folder / "eagle3")
    tiny.save_block(tiny.block(target, block_size=8, head_dim=64), folder / "block")
    named = {"speculate": {"speculate": heads / "draft_model"}, "medusa": {"medusa": heads / "medusa"},
             "eagle3": {"draft": folder / "eagle3"}, "block": {"draft": folder / "block"}}
    return {name: named.get(name.split("+")[0], {}) for name in METHODS}
