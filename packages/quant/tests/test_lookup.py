"""Nearest-code search against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.core.matmul import has_packed_products
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


@pytest.fixture(params=["packed", "plain"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Once with PyTorch's private operators and once as if it did not have them."""
    assert has_packed_products(), "this PyTorch has lost them: half of the speed is gone"
    if request.param == "plain":
        monkeypatch.setattr(lookup, "has_packed_products", lambda: False)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 16, 37, 100])
@pytest.mark.parametrize("group", [1, 3, 16])
@pytest.mark.usefixtures("arithmetic")
def test_blocks_and_groups_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch, rows: int, group: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points, codebook = _integers(generator, 100, 4), _integers(generator, 50, 4)
    monkeypatch.setattr(lookup, "MIN_ROWS", 1)
    monkeypatch.setattr(lookup, "CPU_BLOCK", rows * len(codebook))
    monkeypatch.setattr(lookup, "GROUP", group)
    monkeypatch.setattr(lookup, "MIN_GROUPS", 1)
    assert torch.equal(nearest_code(points, codebook), nearest_code_plain(points, codebook))


@pytest.mark.parametrize(("codes", "dim"), [(1, 1), (511, 8), (512, 1), (1000, 8), (2048, 3)])
@pytest.mark.usefixtures("arithmetic")
def test_real_groups_with_ties(codes: int, dim: int) -> None:
    """Small whole numbers: many codes are equal, and the first of them may be in any group."""
    generator = torch.Generator().manual_seed(codes)
    points, codebook = _integers(generator, 300, dim), _integers(generator, codes, dim)
    assert torch.equal(nearest_code(points, codebook), nearest_code_plain(points, codebook))


@pytest.mark.parametrize(("codes", "dim", "cosine"), [(4096, 8, True), (2000, 32, False), (1024, 256, False)])
@pytest.mark.usefixtures("arithmetic")
def test_the_indices_of_float64(codes: int, dim: int, cosine: bool) -> None:
    generator = torch.Generator().manual_seed(dim)
    points, codebook = (torch.randn(rows, dim, generator=generator) for rows in (1500, codes))
    if cosine:
        points, codebook = F.normalize(points), F.normalize(codebook)
    found = nearest_code(points, codebook)
    assert torch.equal(found, torch.cdist(points.double(), codebook.double()).argmin(1))
    assert torch.equal(found, nearest_code(points.double(), codebook.double()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("arithmetic")
def test_what_is_not_finite_gets_a_code_that_exists(value: float) -> None:
    points = torch.randn(40, 8)
    points[7, 3] = value
    codebook = torch.randn(1000, 8)
    found = nearest_code(points, codebook)
    assert 0 <= found.min() <= found.max() < 1000
    others = torch.arange(40) != 7
    assert torch.equal(found[others], nearest_code(points[others], codebook))


def test_less_precise_products_do_not_change_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    points, codebook = torch.randn(300, 16), torch.randn(600, 16)
    expected = nearest_code(points, codebook)
    scores = lookup._scores
    during: list[str] = []

    def watched(codes: torch.Tensor, rows: int) -> Any:
        during.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return scores(codes, rows)

    monkeypatch.setattr(lookup, "_scores", watched)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(nearest_code(points, codebook), expected)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert during == ["ieee"]


def test_first_of_equal_codes_wins() -> None:
    code = torch.tensor([[1.0, 2.0]])
    codebook = torch.cat([torch.zeros(3, 2), code, torch.zeros(40, 2), code])
    assert nearest_code(code.repeat(20, 1), codebook).tolist() == [3] * 20


def test_random_vectors_get_a_code_as_near_as_any() -> None:
    points, codebook = torch.randn(500, 16), torch.randn(300, 16)
    distances = torch.cdist(points.double(), codebook.double())
    found = distances.gather(1, nearest_code(points, codebook)[:, None]).squeeze(1)
    torch.testing.assert_close(found, distances.min(1).values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("codes", [1024, 2**18])
def test_never_holds_all_scores(codes: int, largest: Any) -> None:
    points, codebook = torch.randn(4096, 2), torch.randn(codes, 2)
    with largest:
        lookup.nearest_code_in_blocks(points, codebook)
    assert largest.elements <= max(lookup.CPU_BLOCK, lookup.MIN_ROWS * codes)
    assert 8 * largest.elements <= len(points) * codes


def test_compiles_as_one_operator() -> None:
    points, codebook = torch.randn(100, 4), torch.randn(700, 4)
    compiled = torch.compile(lambda x, e: nearest_code(x, e) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(points, codebook), nearest_code(points, codebook) + 1)
    torch.library.opcheck(torch.ops.smalti.nearest_code.default, (points, codebook))


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
