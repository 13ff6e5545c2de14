import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.backbones.positions import resampled
from smalti.core.errors import UserError


def test_a_table_that_fits_stays_itself():
    table = torch.randn(1, 1 + 16, 3)
    assert resampled(table, (4, 4), prefix=1) is table


@settings(deadline=None, max_examples=10)
@given(prefix=st.integers(0, 2), height=st.integers(1, 9), width=st.integers(1, 9))
def test_resampling(prefix, height, width):
    table = torch.randn(1, prefix + 16, 2, generator=torch.Generator().manual_seed(height))
    found = resampled(table, (height, width), prefix=prefix)
    assert found.shape == (1, prefix + height * width, 2)
    assert torch.equal(found[:, :prefix], table[:, :prefix])
    channel = table[0, prefix:, 1].view(1, 1, 4, 4)
    expected = F.interpolate(channel, (height, width), mode="bicubic", antialias=True)
    torch.testing.assert_close(found[0, prefix:, 1], expected.flatten(), atol=1e-6, rtol=1e-5)


def test_a_constant_table_stays_constant_and_keeps_its_dtype():
    found = resampled(torch.full((1, 16, 2), 0.5, dtype=torch.bfloat16), (7, 3))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, torch.full((1, 21, 2), 0.5, dtype=torch.bfloat16))


def test_gradients_reach_the_table():
    table = torch.randn(1, 17, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(resampled(table, (6, 5), prefix=1).sum(), table)[0].abs().min() > 0


def test_a_table_of_no_square_is_told():
    with pytest.raises(UserError, match=r"^a position table of 15 places is of no square grid$"):
        resampled(torch.zeros(1, 15, 2), (2, 2))
