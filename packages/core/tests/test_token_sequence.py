import pytest
import torch
from pydantic import ValidationError

from smalti.core.backbones.token_sequence import SequenceEmbedding, TokenSequence, TransformerOptions
from smalti.core.errors import UserError


def parts(batch=2, latents=3, extra=2, width=8):
    torch.manual_seed(0)
    return torch.randn(batch, 6, width), torch.randn(batch, latents, width), torch.randn(batch, extra, width)


@pytest.mark.parametrize("class_token", ["placed", "unplaced", "none"])
def test_order_and_positions(class_token):
    grid, latents, extra = parts()
    embedding = SequenceEmbedding(8, (2, 3), class_token=class_token, latents=4, extra=2)
    joined = embedding(grid, latents, extra)
    positions = embedding.grid_positions
    expected = [grid + positions[-6:], latents + embedding.latent_positions[:3], extra + embedding.extra_positions]
    if class_token == "placed":
        expected.insert(0, (embedding.class_token + positions[0]).expand(2, 1, 8))
        assert len(positions) == 7
    elif class_token == "unplaced":
        expected.insert(0, embedding.class_token.expand(2, 1, 8))
    torch.testing.assert_close(joined, torch.cat(expected, 1))
    taken = embedding.split(joined, latents=3)
    for one, other in zip(taken, expected[-3:], strict=True):
        torch.testing.assert_close(one, other)


def test_parts_that_are_not_there():
    grid, latents, _ = parts()
    embedding = SequenceEmbedding(8, (2, 3), class_token="none")
    assert torch.equal(embedding(grid), grid + embedding.grid_positions)
    assert torch.equal(embedding(grid, latents)[:, 6:], latents)  # no positions of their own
    taken = embedding.split(embedding(grid), latents=0)
    assert [part.shape[1] for part in taken] == [6, 0, 0]


def test_too_many_latent_tokens_are_told():
    grid, latents, _ = parts(latents=5)
    with pytest.raises(UserError, match=r"^5 latent tokens do not fit: there are 4 positions$"):
        SequenceEmbedding(8, (2, 3), latents=4)(grid, latents)


def test_the_transformer_is_its_parts_in_order():
    options = TransformerOptions(width=8, layers=2, heads=2, norm_eps=1e-3, qkv_bias=False, activation="tanh")
    sequence = TokenSequence(options, (2, 3), latents=3, extra=2)
    grid, latents, extra = parts()
    x = sequence.norm_pre(sequence.embedding(grid, latents, extra))
    for block in sequence.blocks:
        x = block(x)
    expected = sequence.embedding.split(sequence.norm_post(x), 3)
    for one, other in zip(sequence(grid, latents, extra), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert sequence.norm_pre.eps == sequence.norm_post.eps == sequence.blocks[0].norm1.eps == 1e-3
    assert sequence.blocks[0].attention.qkv.bias is None
    assert isinstance(sequence.blocks[0].mlp[1], torch.nn.Tanh)


def test_without_the_first_norm():
    options = TransformerOptions(width=8, layers=1, heads=2, norm_pre=False)
    sequence = TokenSequence(options, (2, 3))
    grid, _, _ = parts()
    expected = sequence.norm_post(sequence.blocks(sequence.embedding(grid)))[:, 1:]
    torch.testing.assert_close(sequence(grid).grid, expected)


def test_heads_divide_the_width():
    with pytest.raises(ValidationError, match="width 8 cannot be divided among 3 heads"):
        TransformerOptions(width=8, layers=1, heads=3)
