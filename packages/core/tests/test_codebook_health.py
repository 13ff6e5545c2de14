"""Codebook health against a count by hand."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions

from smalti.core.codebook_health import DISTANCE_QUANTILES, CodebookHealth, CollapseWatch, code_distances, figures_of
from smalti.core.contracts import Quantizer
from smalti.core.errors import UserError


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
    with pytest.raises(UserError) as error:
        CodebookHealth((4,), scales=(1, 4)).update(torch.zeros(2, 4, 1, dtype=torch.int64))
    assert str(error.value) == "scales of (1, 4) positions have 5 tokens, got 4"


def test_scales_are_looked_at_separately() -> None:
    health = CodebookHealth((4, 4), queue=6, scales=(1, 2))
    health.update(torch.tensor([[[0, 3], [1, 3], [2, 3]], [[0, 3], [1, 3], [1, 2]]]))
    assert health.result()["usage"] == [0.75, 0.5]
    assert [scale.result()["usage"] for scale in health.scales] == [[0.25, 0.25], [0.5, 0.5]]
    assert [scale.result()["dead_codes"] for scale in health.scales] == [[3.0, 3.0], [2.0, 2.0]]
    # Every scale has a queue of its own: that of the first still holds what it saw six images ago.
    for _ in range(4):
        health.update(torch.tensor([[[3, 0], [3, 0], [3, 0]]]))
    assert health.result()["usage"] == [0.25, 0.25]
    assert [scale.result()["usage"] for scale in health.scales] == [[0.5, 0.5], [0.25, 0.25]]


@pytest.mark.parametrize("queue", [None, 3])
def test_streams_that_dropout_left_out_are_not_counted(queue: int | None) -> None:
    health = CodebookHealth((4, 4), queue=queue)
    health.update(torch.tensor([[[0], [1]]]))
    assert health.result() == {"usage": [0.5, 0.0], "perplexity": [pytest.approx(2.0), 0.0], "dead_codes": [2.0, 4.0]}
    health.update(torch.tensor([[[0, 1]]]))
    health.update(torch.tensor([[[0], [0]]]))
    assert health.result()["usage"] == [0.5 if queue is None else 0.25, 0.25]


@pytest.mark.parametrize("queue", [None, 5])
def test_going_on_from_a_state(queue: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, (2, 3, 2), generator=generator) for _ in range(4)]
    whole, first, second = (CodebookHealth((4, 4), queue=queue, scales=(1, 2)) for _ in range(3))
    for batch in batches:
        whole.update(batch)
    for batch in batches[:2]:
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[2:]:
        second.update(batch)
        first.update(torch.zeros(1, 3, 2, dtype=torch.int64))  # what was taken out shares nothing
    assert second.result() == whole.result()
    assert [scale.result() for scale in second.scales] == [scale.result() for scale in whole.scales]


def test_figures_of_histograms() -> None:
    found = figures_of([torch.tensor([2, 2, 2, 2, 0, 0, 0, 0]), torch.tensor([3, 1])])
    assert found["usage"] == [0.5, 1.0]
    assert found["perplexity"] == pytest.approx([4.0, 4 / 3**0.75])
    assert found["dead_codes"] == [4.0, 0.0]


def test_a_collapse_is_told_once_for_each_stream() -> None:
    watch = CollapseWatch(2)
    assert watch.check([0.5, 0.9]) == []
    assert watch.check([0.8, 0.46]) == []
    other = CollapseWatch(2)
    other.load_state_dict(watch.state_dict())
    assert watch.check([0.4, 0.44]) == [1]
    assert watch.check([0.39, 0.1]) == [0]
    assert watch.check([0.0, 0.0]) == []
    assert other.check([0.39, 0.46]) == [0]


class _Sum(Quantizer):
    """The sum of one code of each of several tables."""

    def __init__(self, *tables: torch.Tensor) -> None:
        super().__init__()
        self.tables = tables
        self.options = SimpleNamespace(name="sum")
        self.dim, self.vocab = tables[0].shape[1], tuple(map(len, tables))

    def forward(self, latent: torch.Tensor) -> None:
        """Nothing here looks at it."""

    def decode(self, tokens: torch.Tensor, space: tuple[int, ...]) -> torch.Tensor:
        codes = [table[part] for table, part in zip(self.tables, tokens.unbind(2), strict=True)]
        return torch.stack(codes).sum(0).view(len(tokens), *space, self.dim)


def test_distances_between_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(size, 6, generator=generator) for size in (7, 100, 3000)]
    tables[1][40] = tables[1][3] + 1e-4
    found = code_distances(_Sum(*tables))
    for table, spectrum in zip(tables[:2], found, strict=False):
        distances = (table[:, None] - table[None]).norm(dim=2).fill_diagonal_(float("inf")).amin(1)
        torch.testing.assert_close(
            torch.tensor(spectrum), distances.quantile(torch.tensor(DISTANCE_QUANTILES)), rtol=1e-3, atol=1e-6
        )
    assert found[1][0] == pytest.approx(1e-4 * math.sqrt(6), rel=0.02)
    # Of more codes than a thousand a sample is looked at, each against all.
    distances = torch.cdist(tables[2], tables[2]).fill_diagonal_(float("inf")).amin(1)
    assert found[2][2] == pytest.approx(float(distances.median()), rel=0.05)
    assert found[2][0] >= float(distances.min()) - 1e-5


def test_codebooks_too_large_for_a_table() -> None:
    tokens = torch.tensor([[[2**40], [5], [2**40], [7]]])
    with pytest.raises(UserError) as error:
        CodebookHealth((2**62,))
    assert str(error.value) == f"a histogram of {2**62} codes is too large: give a queue of tokens to look at"
    health = CodebookHealth((2**62,), queue=3)
    health.update(tokens)
    assert health.result() == {
        "usage": [3 / 2**62],
        "perplexity": [pytest.approx(3.0)],
        "dead_codes": [float(2**62 - 3)],
    }
    huge = SimpleNamespace(vocab=(2**62,), parameters=list, buffers=list)
    assert code_distances(huge) == [[]]


def test_signs_lie_two_apart() -> None:
    assert code_distances(SignsOptions(dim=4).build()) == [[2.0] * 5]
