"""Codebook health against a count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.quant.health import CodebookHealth


def _figures(tokens: list[int], size: int) -> dict[str, float]:
    counts = [tokens.count(code) for code in range(size)]
    shares = [count / len(tokens) for count in counts if count]
    return {
        "usage": len(shares) / size,
        "perplexity": math.exp(-sum(share * math.log(share) for share in shares)),
        "dead_codes": float(counts.count(0)),
    }


@settings(deadline=None, max_examples=40)
@given(
    batches=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=5),
    queue=st.none() | st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_equals_a_count_by_hand(batches: list[tuple[int, int]], queue: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    vocab = (3, 8)
    health = CodebookHealth(vocab, queue=queue)
    seen: list[list[int]] = [[], []]
    for shape in batches:
        tokens = torch.stack([torch.randint(size, shape) for size in vocab], dim=2)
        health.update(tokens)
        for stream in range(2):
            seen[stream] += tokens[..., stream].flatten().tolist()
    found = health.result()
    for stream, size in enumerate(vocab):
        expected = _figures(seen[stream][-queue:] if queue else seen[stream], size)
        for name, value in expected.items():
            assert found[name][stream] == pytest.approx(value), name


def test_results_are_plain_floats() -> None:
    health = CodebookHealth((4,))
    health.update(torch.tensor([[[0], [1]]]))
    assert health.result() == {"usage": [0.5], "perplexity": [pytest.approx(2.0)], "dead_codes": [2.0]}
    assert all(type(value) is float for values in health.result().values() for value in values)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError) as error:
        CodebookHealth((4,)).result()
    assert str(error.value) == "codebook health has seen no tokens: call update(tokens) before result()"
    with pytest.raises(UserError) as error:
        CodebookHealth((4, 2)).update(torch.full((1, 1, 2), 2))
    assert str(error.value) == "token 2 of stream 1 is out of range: there are 2 codes, 0 to 1"
    with pytest.raises(UserError) as error:
        CodebookHealth((4,), queue=0)
    assert str(error.value) == "a queue of tokens holds at least one, got 0"
