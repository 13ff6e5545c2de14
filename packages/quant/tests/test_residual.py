"""Residual quantization: values, gradients, dropout, shared codebooks, partial decoding, implicit codebooks, beams."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.testing import QuantizerContract
from smalti.quant.beam_search import beam_search
from smalti.quant.estimators import diveq
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.lfq import LookupFreeOptions
from smalti.quant.qinco import ImplicitCodebooks, ImplicitCodebooksOptions
from smalti.quant.residual import Residual, ResidualOptions
from smalti.quant.vector import VectorQuantizerOptions

VQ = VectorQuantizerOptions(dim=3, codebook_size=16, initialise="normal")
EMA = VectorQuantizerOptions(dim=3, codebook_size=16, initialise="normal", update="ema", ema_decay=0.5)
BITS = LookupFreeOptions(bits=(3,))


def _build(*units: object, **options: object) -> Residual:
    torch.manual_seed(0)
    return ResidualOptions(quantizers=units or (VQ,), **options).build()


class TestImplicitCodebooks(QuantizerContract):
    options = ImplicitCodebooksOptions(dim=4, codebook_size=12, depth=3, hidden=8, blocks=2)


class TestImplicitCodebooksByLevels(QuantizerContract):
    options = ImplicitCodebooksOptions(dim=4, codebook_size=12, depth=2, gradient="levels", estimator="rotation")


class TestBeams(QuantizerContract):
    options = ResidualOptions(
        quantizers=(VectorQuantizerOptions(dim=4, codebook_size=12, initialise="normal", update="ema"),),
        depth=3,
        beams=3,
    )


def test_the_whole_is_a_straight_through_sum_of_levels() -> None:
    module = _build(depth=3).train()
    latent, probe = torch.randn(2, 5, 3, requires_grad=True), torch.randn(2, 5, 3)
    quantized = module(latent)
    rest, prefix, commitment = latent, torch.zeros(2, 5, 3), 0.0
    for level, unit in enumerate(module.units):
        tokens = torch.cdist(rest.detach(), unit.codebook.detach()).argmin(-1)
        assert torch.equal(quantized.tokens[..., level], tokens)
        codes = unit.codebook[tokens].detach()
        prefix, rest = prefix + codes, rest - codes
        commitment = commitment + 0.25 * F.mse_loss(latent, prefix)
    torch.testing.assert_close(quantized.latent, prefix)
    torch.testing.assert_close(quantized.losses["commitment"], commitment)
    (quantized.latent * probe).sum().backward()
    assert torch.equal(latent.grad, probe)


@pytest.mark.parametrize(
    ("options", "times"), [({}, 3), ({"quant_grad_frac": 1.0}, 1), ({"quant_grad_frac": 0.5}, 1.75)]
)
def test_levels_add_up_their_gradients(options: dict[str, float], times: float) -> None:
    module = _build(depth=3, gradient="levels", **options).train()
    latent = torch.randn(2, 5, 3, requires_grad=True)
    module(latent).latent.sum().backward()
    torch.testing.assert_close(latent.grad, torch.full((2, 5, 3), float(times)))


def test_units_may_differ() -> None:
    module = _build(VQ, LookupFreeOptions(bits=(1, 2), scale=0.5), FiniteScalarOptions(levels=(3, 3, 3))).eval()
    quantized = module(torch.randn(2, 5, 3))
    assert module.vocab == (16, 2, 4, 27)
    assert torch.equal(module.decode(quantized.tokens, (5,)), quantized.latent)
    assert torch.equal(
        module.decode(quantized.tokens[..., :3], (5,)),
        module.units[0].decode(quantized.tokens[..., :1], (5,))
        + module.units[1].decode(quantized.tokens[..., 1:3], (5,)),
    )


@settings(deadline=None, max_examples=20)
@given(depth=st.integers(1, 5), levels=st.integers(1, 5), seed=st.integers(0, 1000))
def test_the_first_levels_decode_alone(depth: int, levels: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = ResidualOptions(quantizers=(VQ,), depth=depth).build().eval()
    first = ResidualOptions(quantizers=(VQ,), depth=min(levels, depth)).build().eval()
    first.load_state_dict(module.state_dict(), strict=False)
    latent = torch.randn(2, 3, 4, 3)
    tokens = module(latent).tokens[..., :levels]
    assert torch.equal(module.decode(tokens, (3, 4)), first(latent).latent)


def test_more_levels_come_nearer() -> None:
    unit = VectorQuantizerOptions(dim=3, codebook_size=16, initialise="data", update="ema")
    torch.manual_seed(0)
    module = ResidualOptions(quantizers=(unit,), depth=4).build()
    latent = torch.randn(2, 100, 3)
    module.train()(latent)
    tokens = module.eval()(latent).tokens
    errors = [F.mse_loss(module.decode(tokens[..., :level], (100,)), latent).item() for level in range(1, 5)]
    assert all(after < 0.7 * before for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("scale", [0.5, (0.5, 0.25, 1.0)])
def test_levels_have_their_scale(scale: float | tuple[float, ...]) -> None:
    module = _build(FiniteScalarOptions(levels=(3, 3, 3), symmetric=True), depth=3, level_scale=scale).eval()
    latent = torch.randn(4, 10, 3).tanh()
    quantized = module(latent)
    assert torch.equal(module.decode(quantized.tokens, (10,)), quantized.latent)
    last = module.units[2].decode(quantized.tokens[..., 2:], (10,)) * torch.as_tensor(scale) ** 2
    torch.testing.assert_close(quantized.latent - module.decode(quantized.tokens[..., :2], (10,)), last)


def test_the_latent_is_squashed() -> None:
    module = _build(clamp=2.0).train()
    latent = (50 * torch.randn(2, 5, 3)).requires_grad_()
    quantized = module(latent)
    expected = module.units[0](2 * torch.tanh(latent / 2))
    assert torch.equal(quantized.tokens, expected.tokens)
    quantized.latent.sum().backward()
    torch.testing.assert_close(latent.grad, 1 - torch.tanh(latent / 2) ** 2)


def test_dropped_levels_neither_count_nor_learn() -> None:
    module = _build(EMA, depth=4, dropout_from=1).train()
    before = [unit.codebook.clone() for unit in module.units]
    module.kept_levels = lambda: 2  # type: ignore[method-assign]
    latent = torch.randn(2, 5, 3)
    quantized = module(latent)
    changed = [not torch.equal(unit.codebook, codebook) for unit, codebook in zip(module.units, before, strict=True)]
    assert changed == [True, True, False, False]
    assert quantized.tokens.shape == (2, 5, 4)
    expected = sum(codebook[quantized.tokens[..., level]] for level, codebook in enumerate(before[:2]))
    torch.testing.assert_close(quantized.latent, expected)
    assert all(unit.training for unit in module.units)


def test_dropped_levels_get_a_gradient_of_zero() -> None:
    module = _build(depth=3, dropout_from=1).train()
    module.kept_levels = lambda: 1  # type: ignore[method-assign]
    quantized = module(torch.randn(2, 5, 3))
    (quantized.latent.sum() + sum(quantized.losses.values())).backward()
    assert bool(module.units[0].codebook.grad.any())
    assert [unit.codebook.grad.abs().sum().item() for unit in module.units][1:] == [0, 0]


def test_dropout_draws_every_multiple_and_goes_on_where_it_stopped() -> None:
    module, resumed = (_build(depth=7, dropout_from=2, dropout_multiple=3) for _ in range(2))
    drawn = [module.kept_levels() for _ in range(40)]
    assert set(drawn) == {3, 6, 7}
    for _ in range(20):
        resumed.kept_levels()
    half = _build(depth=7, dropout_from=2, dropout_multiple=3)
    half.load_state_dict(resumed.state_dict())
    assert [half.kept_levels() for _ in range(20)] == drawn[20:]


def test_a_shared_codebook_is_written_once_per_step() -> None:
    module = _build(EMA, depth=3, shared=True).train()
    before = module.units[0].codebook.clone()
    quantized = module(torch.randn(2, 50, 3))
    assert len(module.units) == 1
    torch.testing.assert_close(quantized.latent, before[quantized.tokens].sum(-2))
    assert not torch.equal(module.units[0].codebook, before)
    assert sum(name.endswith("codebook") for name in module.state_dict()) == 1


def test_a_shared_stack_of_shared_levels_is_written_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = ResidualOptions(quantizers=(EMA,), depth=2, shared=True)
    module = _build(stack, depth=2, shared=True).train()
    (unit,) = module.units[0].units
    seen: list[int] = []
    learn = unit.learning.learn

    def noted(codebook: Tensor, of: list[object]) -> None:
        seen.append(len(of))
        learn(codebook, of)

    monkeypatch.setattr(unit.learning, "learn", noted)
    module(torch.randn(2, 50, 3))
    assert seen == [4]
    unit(torch.randn(2, 50, 3))
    assert seen == [4, 1]


def test_beams_find_what_trying_everything_finds() -> None:
    module = _build(VectorQuantizerOptions(dim=3, codebook_size=6, initialise="normal"), depth=3, beams=36).eval()
    latent = torch.randn(2, 5, 3)
    paths = torch.tensor(list(itertools.product(range(6), repeat=3)))
    errors = torch.zeros(2, 5, len(paths))
    rest = latent[:, :, None].expand(-1, -1, len(paths), -1)
    for level, unit in enumerate(module.units):
        rest = rest - unit.codebook[paths[:, level]]
        errors = errors + rest.square().sum(-1)
    quantized = module(latent)
    # So many beams hold every path but for the last level.
    assert torch.equal(quantized.tokens, paths[errors.argmin(-1)])
    assert torch.equal(module.decode(quantized.tokens, (5,)), quantized.latent)


def test_one_beam_takes_the_nearest_codes() -> None:
    module = _build(depth=3).eval()
    latent = torch.randn(2, 4, 5, 3)
    assert torch.equal(beam_search(list(module.units), latent, 1), module(latent).tokens)


def test_beams_learn_from_the_path_they_take() -> None:
    module = _build(EMA, depth=2, beams=4).train()
    codebooks = [unit.codebook.clone() for unit in module.units]
    latent = torch.randn(2, 40, 3)
    tokens = module(latent).tokens
    rest = latent.flatten(0, 1)
    for level, unit in enumerate(module.units):
        twin = EMA.build().learning.ema
        twin.sums.copy_(codebooks[level])
        twin.update(tokens[..., level].flatten(), rest)
        torch.testing.assert_close(unit.codebook, twin.codebook())
        rest = rest - codebooks[level][tokens[..., level].flatten()]


def test_the_first_batch_makes_codes_before_beams_search_them() -> None:
    unit = VectorQuantizerOptions(dim=3, codebook_size=16, initialise="data", update="ema")
    nearest, beams = (_build(unit, depth=3, beams=beams).train() for beams in (1, 4))
    latent = torch.randn(2, 100, 3)
    assert torch.equal(beams(latent).latent, nearest(latent).latent)
    assert not torch.equal(beams(latent).tokens, nearest(latent).tokens)


def _plain_codes(module: ImplicitCodebooks, total: Tensor, level: int) -> Tensor:
    """All codes `(N, K, D)` of a level after the sums `(N, D)`."""
    codes = module.codebooks[level].expand(len(total), -1, -1)
    return codes if level == 0 else module.networks[level - 1](total[:, None].expand_as(codes), codes)


def test_evaluation_may_follow_more_beams() -> None:
    latent = torch.randn(2, 40, 3)
    few, more, wide = (
        _build(VQ, depth=3, beams=beams, eval_beams=evaluated) for beams, evaluated in ((1, None), (1, 8), (8, None))
    )
    assert torch.equal(more.train()(latent).tokens, few.train()(latent).tokens)
    assert torch.equal(more.eval()(latent).tokens, wide.eval()(latent).tokens)
    assert not torch.equal(more(latent).tokens, few.eval()(latent).tokens)


@pytest.mark.parametrize("variance", [0.0, 0.1])
def test_diveq_takes_the_distance_to_the_sum_and_moves_all_codes(variance: float) -> None:
    module = _build(VQ, depth=3, gradient="diveq", diveq_variance=variance).train()
    latent, probe = torch.randn(2, 9, 3, requires_grad=True), torch.randn(2, 9, 3)
    torch.manual_seed(1)
    quantized = module(latent)
    (quantized.latent * probe).sum().backward()
    decoded = module.decode(quantized.tokens, (9,))
    assert torch.equal(quantized.latent, decoded) == (variance == 0)
    torch.manual_seed(1)
    twin = latent.detach().clone().requires_grad_()
    codes = sum(unit.codebook[tokens] for unit, tokens in zip(module.units, quantized.tokens.unbind(-1), strict=True))
    codebooks = [unit.codebook for unit in module.units]
    output = (diveq(twin, codes, variance) * probe).sum()
    expected = torch.autograd.grad(output, [twin, *codebooks])
    torch.testing.assert_close(latent.grad, expected[0])
    for codebook, gradient in zip(codebooks, expected[1:], strict=True):
        torch.testing.assert_close(codebook.grad, gradient)
    assert torch.equal(module.eval()(latent).latent, decoded)


def test_implicit_codebooks_search_among_the_codes_of_each_token() -> None:
    torch.manual_seed(0)
    module = ImplicitCodebooksOptions(dim=3, codebook_size=8, depth=3).build().train()
    latent = torch.randn(2, 5, 3, requires_grad=True)
    quantized = module(latent)
    total, codebook_loss = torch.zeros(10, 3), 0.0
    for level in range(3):
        codes = _plain_codes(module, total, level)
        rest = latent.detach().view(10, 3) - total
        tokens = (rest[:, None] - codes).square().sum(-1).argmin(-1)
        assert torch.equal(quantized.tokens[..., level].flatten(), tokens)
        chosen = codes[torch.arange(10), tokens]
        codebook_loss = codebook_loss + F.mse_loss(chosen, rest)
        total = total + chosen.detach()
    torch.testing.assert_close(quantized.latent.view(10, 3), total)
    torch.testing.assert_close(quantized.losses["codebook"], codebook_loss)
    expected = torch.autograd.grad(codebook_loss, list(module.parameters()))
    found = torch.autograd.grad(quantized.losses["codebook"], list(module.parameters()), retain_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    (gradient,) = torch.autograd.grad(quantized.latent.sum(), latent)
    assert torch.equal(gradient, torch.ones(2, 5, 3))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"quantizers": (VQ, VectorQuantizerOptions(dim=2, codebook_size=4))},
            "the units of a residual quantizer need one width, got [2, 3]",
        ),
        ({"level_scale": (1.0, 0.5)}, "level_scale needs one number per channel, 3, got 2"),
        ({"depth": 2, "dropout_from": 3}, "dropout_from is 3, but there are 2 levels"),
        ({"quantizers": (BITS,), "beams": 2}, "beam search needs vq units: set beams to 1"),
        ({"beams": 2, "level_scale": 0.5}, "beam search needs levels of one scale, got level_scale 0.5"),
        (
            {"quantizers": (LookupFreeOptions(bits=(3,)),), "eval_beams": 2},
            "beam search needs vq units: set beams to 1",
        ),
        (
            {"quantizers": (EMA,), "gradient": "diveq"},
            "gradient: diveq moves the codes by their gradient: the units need update: loss",
        ),
    ],
)
def test_wrong_options_are_told(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        ResidualOptions(**{"quantizers": (VQ,), **options}).build()
    assert str(error.value) == sentence


def test_wrong_tokens_are_told() -> None:
    module = _build(depth=2)
    with pytest.raises(UserError, match=r"^tokens must be int64 \(B, L, 2\), got torch.int64 \(1, 4, 3\)$"):
        module.decode(torch.zeros(1, 4, 3, dtype=torch.int64), (4,))
    with pytest.raises(UserError, match=r"^tokens must be int64 \(B, L, 1\), got torch.int64 \(1, 4, 0\)$"):
        module.decode(torch.zeros(1, 4, 0, dtype=torch.int64), (4,))
    with pytest.raises(UserError, match=r"^token 16 of stream 1 is out of range: there are 16 codes, 0 to 15$"):
        module.decode(torch.tensor([[[0, 16]]]), (1,))
