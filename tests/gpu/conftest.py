"""What the GPU tests share: engines of all kinds on the demo model, and how many kernels Triton has compiled."""
import pytest
import torch

from app.options import Engine
from draft import Eagle2, Vanilla
from drafters.eagle1 import Eagle1
from drafters.heads import load_head
from drafters.lookahead import Lookahead
from drafters.lookup import Lookup, Retrieval
from drafters.medusa import Medusa, MedusaHeads
from drafters.speculate import Speculate
from model import load_model


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
