"""The training step of every generator is one graph; VAR's, which needs a tokenizer, is in `tests/test_var.py`."""

import importlib

import pytest
import torch

from smalti.core.layout import TokenLayout

GRID, STREAMS = TokenLayout.grid(2, 2, (8,)), TokenLayout.grid(2, 2, (8, 4))
GENERATORS = {
    "ar": ("AROptions", {}, GRID),
    "ar of several streams with dropout": ("AROptions", {"flatten": True, "drop_path": 0.1}, STREAMS),
    "far": ("FAROptions", {}, STREAMS),
    "rar": ("RAROptions", {}, GRID),
    "maskgit": ("MaskGITOptions", {}, GRID),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_the_training_step_is_one_graph(kind: str) -> None:
    name, options, layout = GENERATORS[kind]
    module = importlib.import_module(f"smalti.generation.{kind.split()[0]}")
    torch.manual_seed(0)
    model = getattr(module, name)(layers=2, dim=16, heads=2, **options).build(layout, 3).train()
    tokens = torch.stack([torch.randint(size, (3, layout.positions)) for size in layout.vocab], dim=-1)
    labels = torch.arange(3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = []
    for step in (compiled, model):
        torch.manual_seed(1)
        losses = step(tokens, labels)
        found.append({term: loss.detach() for term, loss in losses.items()})
        torch.stack([*losses.values()]).sum().backward()
    torch.testing.assert_close(found[0], found[1])
