"""Nearest-code search against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from smalti.core.errors import UserError
from smalti.quant import lookup
from smalti.quant.lookup import nearest_code, nearest_code_plain


def _integers(generator: torch.Generator, rows: int, width: int) -> torch.Tensor:
    """Small whole numbers: all arithmetic on them is exact, and equally near codes are common."""
    return torch.randint(-3, 4, (rows, width), generator=generator).float()


@settings(deadline=None, max_examples=60)
@given(vectors=st.integers(0, 70), codes=st.integers(1, 90), width=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_equals_the_definition_where_arithmetic_is_exact(vectors: int, codes: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, codebook = _integers(generator, vectors, width), _integers(generator, codes, width)
    found = nearest_code(points, codebook)
    assert found.dtype == torch.int64
    assert torch.equal(found, nearest_code_plain(points, codebook))


@pytest.mark.parametrize(("vectors", "codes"), [(0, 5), (1, 5), (1, 1), (7, 1000), (1000, 7)])
def test_sizes(vectors: int, codes: int) -> None:
    points, codebook = torch.randn(vectors, 3), torch.randn(codes, 3)
    assert torch.equal(nearest_code(points, codebook), nearest_code_plain(points, codebook))


@pytest.mark.parametrize("rows", [1, 16, 37, 100])
def test_blocks_of_any_height_give_the_same(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points, codebook = _integers(generator, 100, 4), _integers(generator, 50, 4)
    monkeypatch.setattr(lookup, "MIN_ROWS", 1)
    monkeypatch.setattr(lookup, "CPU_BLOCK", rows * len(codebook))
    assert torch.equal(nearest_code(points, codebook), nearest_code_plain(points, codebook))


def test_first_of_equal_codes_wins() -> None:
    code = torch.tensor([[1.0, 2.0]])
    codebook = torch.cat([torch.zeros(3, 2), code, torch.zeros(40, 2), code])
    assert nearest_code(code.repeat(20, 1), codebook).tolist() == [3] * 20


def test_random_vectors_get_a_code_as_near_as_any() -> None:
    points, codebook = torch.randn(500, 16), torch.randn(300, 16)
    distances = torch.cdist(points.double(), codebook.double())
    found = distances.gather(1, nearest_code(points, codebook)[:, None]).squeeze(1)
    torch.testing.assert_close(found, distances.min(1).values, rtol=1e-6, atol=0)


def test_never_holds_all_scores() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    points, codebook = torch.randn(4096, 2), torch.randn(1024, 2)
    with Largest() as largest:
        nearest_code(points, codebook)
    assert largest.elements == lookup.CPU_BLOCK < len(points) * len(codebook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_change_the_search(dtype: torch.dtype) -> None:
    points, codebook = torch.randn(2000, 8).to(dtype), torch.randn(500, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest_code(points, codebook)
    assert torch.equal(found, nearest_code(points.float(), codebook))


def test_has_no_gradient() -> None:
    points, codebook = torch.randn(5, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    assert not nearest_code(points, codebook).requires_grad


@pytest.mark.parametrize("search", [nearest_code, nearest_code_plain])
def test_shapes_that_do_not_fit_are_told(search: Any) -> None:
    with pytest.raises(UserError) as error:
        search(torch.zeros(4, 3), torch.zeros(5, 2))
    assert str(error.value) == (
        "the nearest code is searched for vectors (N, D) among codes (K, D) with K at least 1, got (4, 3) and (5, 2)"
    )
    with pytest.raises(UserError, match=r"got \(4, 3\) and \(0, 3\)"):
        search(torch.zeros(4, 3), torch.zeros(0, 3))
