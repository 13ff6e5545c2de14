"""Figures of tokens: use of codes and bits of an image."""

import math

import pytest
import torch

from smalti.core.codebook_health import figures_of
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.eval.tokens import TokenStatistics

SCALES = TokenLayout.scales(((1, 1), (2, 3)), (4, 16))


def tokens(count, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.randint(0, size - 1, (count, layout.positions), generator=generator) for size in layout.vocab]
    return torch.stack(streams, dim=2)


def entropy(codes):
    shares = codes.unique(return_counts=True)[1].double() / codes.numel()
    return float(-(shares * shares.log2()).sum())


def test_figures_of_streams_and_scales():
    found = TokenStatistics(SCALES, side_bits=40).update(drawn := tokens(50, SCALES)).compute()
    counts = [
        torch.bincount(codes.flatten(), minlength=size) for codes, size in zip(drawn.unbind(2), (4, 16), strict=True)
    ]
    expected = figures_of(counts)
    assert found.usage == expected["usage"]
    assert found.perplexity == pytest.approx(expected["perplexity"])
    assert found.entropy == pytest.approx([entropy(codes) for codes in drawn.unbind(2)])
    parts = drawn.split((1, 6), dim=1)
    for scale, part in zip(found.by_scale, parts, strict=True):
        assert scale.entropy == pytest.approx([entropy(codes) for codes in part.unbind(2)])
    assert found.bits == 7 * (2 + 4) + 40
    coded = sum(part.shape[1] * entropy(codes) for part in parts for codes in part.unbind(2))
    assert found.entropy_bits == pytest.approx(coded + 40)
    assert found.side_bits == 40


def test_a_grid_has_no_scales():
    found = TokenStatistics(TokenLayout.grid(2, 2, (8,))).update(torch.zeros(3, 4, 1, dtype=torch.int64)).compute()
    assert (found.by_scale, found.bits, found.entropy_bits) == ([], 12, 0)
    assert (found.usage, found.perplexity, found.entropy) == ([1 / 8], [1], [0])


def test_processes_add_up():
    drawn = tokens(40, SCALES)
    whole, first, second = (TokenStatistics(SCALES) for _ in range(3))
    whole.update(drawn)
    second.update(drawn[:9])
    first.update(drawn[9:])
    first.merge(second)
    assert first.compute() == whole.compute()
    second.load_state_dict(whole.state_dict())
    assert second.compute() == whole.compute()
    second.update(drawn)
    assert whole.images == 40
    assert whole.compute().entropy == pytest.approx(second.compute().entropy)
    whole.reset()
    with pytest.raises(UserError, match="there are no tokens yet"):
        whole.compute()


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda: TokenStatistics(SCALES, -1), "side information takes 0 bits or more, got -1"),
        (lambda: TokenStatistics(SCALES, math.nan), "side information takes 0 bits or more, got nan"),
        (
            lambda: TokenStatistics(TokenLayout.grid(2, 2, (2**25,))),
            f"a histogram of {2**25} codes is too large to count",
        ),
        (
            lambda: TokenStatistics(SCALES).update(tokens(2, SCALES)[:, :5]),
            f"images of the layout {SCALES} have 7 tokens, not 5",
        ),
        (
            lambda: TokenStatistics(SCALES).merge(TokenStatistics(TokenLayout.grid(1, 7, (4, 16)))),
            f"tokens of the layout {TokenLayout.grid(1, 7, (4, 16))} do not go with those of {SCALES}",
        ),
    ],
)
def test_wrong_tokens_are_refused(action, sentence):
    with pytest.raises(UserError) as error:
        action()
    assert str(error.value) == sentence


def test_equal_use_takes_all_bits():
    every = torch.arange(16).repeat(8).reshape(2, 64, 1)
    found = TokenStatistics(TokenLayout.grid(8, 8, (16,))).update(every).compute()
    assert found.entropy_bits == pytest.approx(found.bits)
    assert found.bits == 64 * math.log2(16)
