"""Rotary tables and rotation, against plain trigonometry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.generation.rotary import grid_rotary, rotary_table, rotate, sequence_rotary


def test_grid_turns_by_row_then_column() -> None:
    height, width, head_dim = 2, 3, 12
    table = grid_rotary(height, width, head_dim)
    assert table.shape == (7, 6)
    assert table[0].tolist() == [0j] * 6
    for row in range(height):
        for column in range(width):
            angles = [place * 10_000 ** (-2 * j / 6) for place in (row, column) for j in range(3)]
            expected = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles])
            torch.testing.assert_close(table[1 + row * width + column], expected)


def test_sequence_turns_by_position() -> None:
    table = sequence_rotary(6, 8)
    assert table.shape == (6, 4)
    for position in range(6):
        angles = [position * 10_000 ** (-2 * j / 8) for j in range(4)]
        expected = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles])
        torch.testing.assert_close(table[position], expected)


def test_the_layout_chooses() -> None:
    assert torch.equal(rotary_table(TokenLayout.grid(2, 3, (9,)), 8), grid_rotary(2, 3, 8))
    assert torch.equal(rotary_table(TokenLayout.sequence(6, (9,)), 8), sequence_rotary(7, 8))


def test_a_longer_prefix_and_several_inputs_per_position() -> None:
    grid = rotary_table(TokenLayout.grid(2, 2, (9,)), 8, prefix=3, repeats=2)
    assert torch.equal(grid, torch.cat([torch.zeros(3, 4), grid_rotary(2, 2, 8)[1:].repeat_interleave(2, dim=0)]))
    sequence = rotary_table(TokenLayout.sequence(2, (9,)), 8, base=100.0, prefix=2)
    assert torch.equal(sequence, sequence_rotary(4, 8, 100.0))


def test_a_table_is_made_once_and_serves_training() -> None:
    layout = TokenLayout.sequence(3, (9,))
    with torch.inference_mode():
        table = rotary_table(layout, 8, base=50.0)
    assert rotary_table(TokenLayout.sequence(3, (7, 7)), 8, base=50.0) is table
    rotate(torch.randn(1, 1, 4, 8, requires_grad=True), table).sum().backward()


def plain_rotate(vectors: Tensor, table: Tensor) -> Tensor:
    turned = torch.empty_like(vectors)
    for position, row in enumerate(table):
        for pair, rotation in enumerate(row):
            a, b = vectors[:, :, position, 2 * pair], vectors[:, :, position, 2 * pair + 1]
            turned[:, :, position, 2 * pair] = a * rotation.real - b * rotation.imag
            turned[:, :, position, 2 * pair + 1] = b * rotation.real + a * rotation.imag
    return turned


def test_rotation_is_the_plain_one_with_gradients() -> None:
    torch.manual_seed(0)
    table = grid_rotary(2, 2, 8)
    fast = torch.randn(3, 2, 5, 8).requires_grad_()
    plain = fast.detach().clone().requires_grad_()
    weights = torch.randn(3, 2, 5, 8)
    torch.testing.assert_close(rotate(fast, table), plain_rotate(plain, table))
    (rotate(fast, table) * weights).sum().backward()
    (plain_rotate(plain, table) * weights).sum().backward()
    torch.testing.assert_close(fast.grad, plain.grad)


def test_the_prefix_of_a_grid_vanishes() -> None:
    turned = rotate(torch.randn(2, 4, 1, 8), grid_rotary(2, 2, 8)[:1])
    assert torch.equal(turned, torch.zeros_like(turned))


@pytest.mark.parametrize("shift", [1, 3])
def test_products_depend_on_the_distance(shift: int) -> None:
    torch.manual_seed(0)
    table = sequence_rotary(10, 8)
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    product, shifted = (
        (rotate(query, table[5 + by : 6 + by]) * rotate(key, table[2 + by : 3 + by])).sum() for by in (0, shift)
    )
    torch.testing.assert_close(product, shifted)


def test_low_precision_is_turned_in_float32() -> None:
    torch.manual_seed(0)
    table = sequence_rotary(4, 8)
    vectors = torch.randn(2, 2, 4, 8).bfloat16()
    turned = rotate(vectors, table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(vectors.float(), table).bfloat16())
