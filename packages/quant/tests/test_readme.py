"""The code in the README does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch


def test_the_training_loop_learns() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    torch.manual_seed(0)
    loaded: dict[str, Any] = {
        "encoder": torch.nn.Linear(12, 8),
        "decoder": torch.nn.Linear(8, 12),
        "batches": [torch.randn(2, 16, 12)] * 30,
        "errors": [],
    }
    exec(block.replace("loss.backward()", "loss.backward(); errors.append(loss.item())"), loaded)
    assert loaded["errors"][-1] < loaded["errors"][0]
    figures = loaded["health"].result()
    assert 0 < figures["usage"][0] <= 1
    assert torch.equal(loaded["codes"], loaded["quantizer"].decode(loaded["tokens"], (16,)))
