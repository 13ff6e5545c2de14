"""What is said of tokens and labels that a generator cannot take."""

from __future__ import annotations

import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.generation.checks import check_batch

LAYOUT = TokenLayout.grid(2, 2, (8, 16))


def test_every_stream_has_its_own_codebook() -> None:
    tokens = torch.tensor([7, 15]).expand(3, 4, 2)
    check_batch(tokens, torch.arange(3), LAYOUT, 3)
    with pytest.raises(UserError) as raised:
        check_batch(tokens.flip(-1), torch.arange(3), LAYOUT, 3)
    assert str(raised.value) == "token 15 is out of range: stream 0 of the layout has 8 codes, 0 to 7"


def test_wrong_labels_come_first() -> None:
    with pytest.raises(UserError, match="label -1 is out of range: there are 3 classes, 0 to 2"):
        check_batch(torch.full((1, 4, 2), 99), torch.tensor([-1]), LAYOUT, 3)


def test_one_value_is_read_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA every value that Python reads waits for the device."""
    reads = []
    as_bool = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: reads.append(1) or as_bool(tensor))
    check_batch(torch.zeros(3, 4, 2, dtype=torch.int64), torch.arange(3), LAYOUT, 3)
    assert len(reads) == 1
