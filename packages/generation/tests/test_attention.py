"""The attention dispatcher: every kernel against the plain formula, and which one runs."""

from __future__ import annotations

import importlib
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.generation import attention
from smalti.generation.attention import BlockCausal, Mask, attend, attention_kernel

SCALES = BlockCausal((1, 2, 3))


def by_hand(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    """One query after the other, over the keys that it sees; `sees` is `(T, N)`."""
    attended = torch.zeros_like(query)
    for row in range(query.shape[2]):
        keys = sees[row].nonzero().flatten()
        scores = torch.einsum("bhd,bhnd->bhn", query[:, :, row], key[:, :, keys]) / math.sqrt(query.shape[-1])
        attended[:, :, row] = torch.einsum("bhn,bhnd->bhd", scores.softmax(-1), value[:, :, keys])
    return attended


def inputs(new: int, seen: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, length, 8).requires_grad_() for length in (new, seen, seen)]


CASES: list[tuple[int, int, Mask, list[str]]] = [
    (5, 5, "causal", ["1....", "11...", "111..", "1111.", "11111"]),
    (1, 5, "causal", ["11111"]),
    (3, 5, "causal", ["111..", "1111.", "11111"]),
    (3, 5, "none", ["11111"] * 3),
    (5, 3, "none", ["111"] * 5),
    (6, 6, SCALES, ["1.....", "111...", "111...", "111111", "111111", "111111"]),
    (2, 3, SCALES, ["111", "111"]),
    (3, 4, torch.eye(4, dtype=torch.bool)[1:] | torch.tensor([True, False, False, False]), ["11..", "1.1.", "1..1"]),
]


@pytest.mark.parametrize("kernel", ["sdpa", "plain", "xformers"])
@pytest.mark.parametrize(("new", "seen", "mask", "expected"), CASES)
def test_values_and_gradients_are_those_of_the_plain_loop(
    kernel: str, new: int, seen: int, mask: Mask, expected: list[str], standin: None
) -> None:
    fast = inputs(new, seen)
    plain = [tensor.detach().clone().requires_grad_() for tensor in fast]
    weights = torch.randn(2, 3, new, 8)
    sees = torch.tensor([[place == "1" for place in row] for row in expected])
    with attention_kernel(kernel):
        outputs = attend(*fast, mask=mask), by_hand(*plain, sees)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * weights).sum().backward()
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module in the place of xformers, which computes as it says it does; gives the calls."""
    calls: list[dict[str, Any]] = []

    class LowerTriangularFromBottomRightMask:
        """Its kind of causal mask."""

    def memory_efficient_attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, p: float, scale: float | None
    ) -> Tensor:
        calls.append({"query": query.shape, "bias": attn_bias, "p": p, "scale": scale})
        scores = torch.einsum("bthd,bnhd->bhtn", query, key) * (scale or query.shape[-1] ** -0.5)
        if isinstance(attn_bias, LowerTriangularFromBottomRightMask):
            new, seen = scores.shape[2:]
            attn_bias = torch.full((new, seen), -torch.inf).triu(seen - new + 1)
        scores = scores if attn_bias is None else scores + attn_bias
        return torch.einsum("bhtn,bnhd->bthd", scores.softmax(-1), value)

    bias = SimpleNamespace(LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask)
    module = SimpleNamespace(
        memory_efficient_attention=memory_efficient_attention, fmha=SimpleNamespace(attn_bias=bias)
    )
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: module if name == "xformers.ops" else real(name))
    attention._xformers_operators.cache_clear()
    yield calls
    attention._xformers_operators.cache_clear()


def test_xformers_is_given_its_own_axes_and_masks(standin: list[dict[str, Any]]) -> None:
    with attention_kernel("xformers"):
        attend(*inputs(3, 5), mask="causal", scale=0.5, dropout=0.1)
        attend(*inputs(1, 5), mask="causal")
    causal, single = standin
    assert causal["query"] == (2, 3, 3, 8)
    assert type(causal["bias"]).__name__ == "LowerTriangularFromBottomRightMask"
    assert (causal["p"], causal["scale"]) == (0.1, 0.5)
    assert single["bias"] is None


def test_without_xformers_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setenv("SMALTI_ATTENTION", "xformers")
    attention._xformers_operators.cache_clear()
    with pytest.raises(UserError) as raised:
        attend(*inputs(2, 2), mask="none")
    assert str(raised.value) == (
        "SMALTI_ATTENTION=xformers needs the package xformers, which cannot be imported (no xformers.ops)"
    )


def test_an_unknown_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALTI_ATTENTION", "magic")
    with pytest.raises(UserError, match="unknown attention kernel 'magic'; there are sdpa, xformers, flex, plain"):
        attend(*inputs(2, 2), mask="none")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_attention_is_the_plain_loop() -> None:
    """On a CPU flex attention is not compiled, and computes what its mask says."""
    query, key, value = (tensor.detach() for tensor in inputs(6, 6))
    with attention_kernel("flex"):
        flexible = attend(query, key, value, mask=SCALES, scale=0.7)
    with attention_kernel("plain"):
        torch.testing.assert_close(flexible, attend(query, key, value, mask=SCALES, scale=0.7))


def test_flex_attention_leaves_other_masks_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, "smalti.generation"), attention_kernel("flex"):
        attend(*inputs(2, 2), mask="causal")
    assert caplog.messages == ["attention by sdpa"]


def test_it_says_once_which_kernel_runs(caplog: pytest.LogCaptureFixture) -> None:
    attention._say.cache_clear()
    with caplog.at_level(logging.INFO, "smalti.generation"):
        for kernel in ("sdpa", "plain", "sdpa", "plain"):
            with attention_kernel(kernel):
                attend(*inputs(2, 2), mask="none")
    assert caplog.messages == ["attention by sdpa", "attention by plain"]


@pytest.mark.parametrize("kernel", ["sdpa", "plain"])
def test_dropout_leaves_entries_out(kernel: str) -> None:
    query, key, value = (tensor.detach() for tensor in inputs(4, 4))
    with attention_kernel(kernel):
        torch.manual_seed(0)
        kept = torch.stack([attend(query, key, value, mask="none", dropout=0.5) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(kept, attend(query, key, value, mask="none"), rtol=0, atol=0.15)


def test_more_queries_than_positions_cannot_be_causal() -> None:
    with pytest.raises(AssertionError, match="3 queries cannot be the last of 2 positions"):
        attend(*inputs(3, 2), mask="causal")


def test_masks_made_in_sampling_serve_training() -> None:
    mask = BlockCausal((2, 1, 4))
    query, key, value = inputs(7, 7)
    with torch.inference_mode():
        attend(*(tensor.detach() for tensor in (query, key, value)), mask=mask)
    attend(query, key, value, mask=mask).sum().backward()
    assert query.grad is not None
