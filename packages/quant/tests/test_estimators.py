"""Gradient estimators: values exactly the codes, gradients those of their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.quant.estimators import diveq, rotation_trick, rotation_trick_plain, scaled_gradient, straight_through


def _pair(width: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latent, codes, probe = (torch.randn(5, width, generator=generator, dtype=dtype) for _ in range(3))
    return latent.requires_grad_(), codes.requires_grad_(), probe


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    latent = (1000 * torch.randn(50, 7)).requires_grad_()
    codes = torch.randn(50, 7, requires_grad=True)
    probe = torch.randn(50, 7)
    output = straight_through(latent, codes)
    (output * probe).sum().backward()
    assert torch.equal(output, codes)
    assert latent.grad is not None
    assert torch.equal(latent.grad, probe)
    assert codes.grad is None


def test_straight_through_keeps_the_types_of_both() -> None:
    latent = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    output = straight_through(latent, torch.randn(5, 3))
    output.sum().backward()
    assert output.dtype == torch.float32
    assert latent.grad is not None
    assert latent.grad.dtype == torch.bfloat16


@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_rotation_is_one_that_turns_and_scales_the_token_onto_its_code(width: int, seed: int) -> None:
    latent, codes, _ = _pair(width, seed)
    assert torch.equal(rotation_trick(latent, codes), codes)
    for token, code in zip(latent.detach(), codes.detach(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda some, code=code: rotation_trick(some, code), token)
        scale = code.norm() / token.norm()
        torch.testing.assert_close(jacobian @ token, code)
        torch.testing.assert_close(jacobian @ jacobian.t(), scale**2 * torch.eye(width, dtype=torch.float64))
        if width > 1:
            assert torch.linalg.det(jacobian / scale).item() == pytest.approx(1.0)


def test_rotation_leaves_what_is_orthogonal_to_token_and_code() -> None:
    token = torch.tensor([2.0, 0, 0], dtype=torch.float64)
    code = torch.tensor([0, 6.0, 0], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda some: rotation_trick(some, code), token)
    torch.testing.assert_close(jacobian, 3 * torch.tensor([[0, -1.0, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64))


@pytest.mark.parametrize("token", [[0.0, 0, 0], [1e-20, 0, 0]])
def test_rotation_of_a_token_without_direction_is_straight_through(token: list[float]) -> None:
    latent = torch.tensor([token], requires_grad=True)
    code, probe = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 5, 6]])
    output = rotation_trick(latent, code)
    assert torch.equal(output, code)
    (output * probe).sum().backward()
    assert latent.grad is not None
    assert torch.equal(latent.grad, probe)


@pytest.mark.parametrize("width", [1, 2, 8, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_is_its_plain_twin_and_keeps_token_and_code_only(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    token, code, probe = torch.randn(3, 7, 5, width, dtype=dtype)
    token[0, 0] = 0
    code[0, 1] = 0
    latent, twin = (token.clone().requires_grad_() for _ in range(2))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        output = rotation_trick(latent, code)
    assert {tensor.data_ptr() for tensor in saved} <= {latent.data_ptr(), code.data_ptr()}
    (output * probe).sum().backward()
    expected = rotation_trick_plain(twin, code)
    (expected * probe).sum().backward()
    assert torch.equal(output, expected)
    torch.testing.assert_close(latent.grad, twin.grad)


def test_rotation_of_opposite_vectors_is_finite() -> None:
    latent = torch.tensor([[1.0, 2, 3]], requires_grad=True)
    code = -2 * latent.detach()
    output = rotation_trick(latent, code)
    (output * code).sum().backward()
    assert torch.equal(output, code)
    torch.testing.assert_close(latent.grad, -2 * code)


def test_diveq_without_noise_is_the_code_and_learns_the_distance() -> None:
    latent, codes, probe = _pair(6, 0)
    output = diveq(latent, codes, 0.0)
    assert torch.equal(output, codes)
    (output * probe).sum().backward()
    step = (codes - latent).detach()
    along = (probe * step).sum(-1, keepdim=True) * step / step.square().sum(-1, keepdim=True)
    torch.testing.assert_close(codes.grad, along)
    torch.testing.assert_close(latent.grad, probe - along)


def test_diveq_with_noise_goes_the_distance_in_another_direction() -> None:
    torch.manual_seed(0)
    latent, codes = torch.randn(1000, 4), torch.randn(1000, 4)
    moved = diveq(latent, codes, 0.01)
    assert not torch.equal(moved, codes)
    torch.testing.assert_close((moved - latent).norm(dim=-1), (codes - latent).norm(dim=-1))
    cosine = torch.cosine_similarity(moved - latent, codes - latent, dim=-1)
    # Of noise across the step, of 3 variances 0.01, against its length.
    expected = (1 / (1 + 0.03 / (codes - latent).square().sum(-1))).sqrt()
    assert cosine.mean().item() == pytest.approx(expected.mean().item(), abs=0.01)


def test_diveq_of_a_token_on_its_code_is_finite() -> None:
    latent = torch.ones(2, 3, requires_grad=True)
    diveq(latent, torch.ones(2, 3), 0.0).sum().backward()
    assert latent.grad is not None
    assert bool(torch.isfinite(latent.grad).all())


def test_scaled_gradient() -> None:
    value = torch.tensor([1 / 3], requires_grad=True)
    output = scaled_gradient(value, 1.2)
    output.sum().backward()
    assert torch.equal(output, value)
    assert value.grad is not None
    assert math.isclose(value.grad.item(), 1.2, rel_tol=1e-6)
