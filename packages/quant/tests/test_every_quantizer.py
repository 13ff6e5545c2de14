"""What goes wrong elsewhere, tried on every registered quantizer: autocast, freezing, compiling, gradients, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantizer
from smalti.core.options import QuantizerOptions
from smalti.core.plugins import registry
from smalti.quant.factorized import FactorizedOptions
from smalti.quant.fsp import FiniteScalarPerturbationOptions
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.gumbel import GumbelOptions
from smalti.quant.ibq import IndexBackpropagationOptions
from smalti.quant.latent import LatentOptions
from smalti.quant.learning import CodebookLearning
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.multi_scale import MultiScaleOptions
from smalti.quant.product import ProductOptions
from smalti.quant.projected import ProjectedOptions
from smalti.quant.qinco import ImplicitCodebooksOptions
from smalti.quant.residual import ResidualOptions
from smalti.quant.rotated import RotatedOptions
from smalti.quant.simvq import SimVQOptions
from smalti.quant.vector import VectorQuantizerOptions

EMA = VectorQuantizerOptions(dim=4, codebook_size=16, update="ema", initialise="data", revive_after=2)
VQ = VectorQuantizerOptions(dim=4, codebook_size=16, initialise="normal", entropy_weight=0.1, entropy_temperature=0.5)
EVERY: tuple[QuantizerOptions, ...] = (
    VQ,
    EMA,
    SimVQOptions(dim=4, codebook_size=16, estimator="rotation"),
    IndexBackpropagationOptions(dim=4, codebook_size=16, entropy_temperature=0.5),
    GumbelOptions(dim=4, codebook_size=16, final_temperature=0.1),
    LookupFreeOptions(bits=(2, 3), entropy_temperature=1.0),
    BinarySphericalOptions(bits=(5,)),
    FiniteScalarOptions(levels=(8, 5, 5)),
    LatentOptions(levels=(8, 5)),
    FiniteScalarPerturbationOptions(levels=(8, 5), noise=0, skewness_weight=0.1),
    ProjectedOptions(dim=6, quantizer=EMA, layer_norm=True),
    RotatedOptions(quantizer=VQ),
    ProductOptions(quantizers=(VQ, EMA)),
    FactorizedOptions(quantizers=(VQ,), branches=2, disentanglement_weight=0.1),
    ResidualOptions(quantizers=(EMA,), depth=3, shared=True),
    MultiScaleOptions(quantizer=EMA, scales=(1, 2, 4), phi=2, dropout=0.5),
    ImplicitCodebooksOptions(dim=4, codebook_size=16, depth=3, blocks=1),
)
every = pytest.mark.parametrize("options", EVERY, ids=lambda options: str(options.name))


def _trained(options: QuantizerOptions) -> tuple[Quantizer, Tensor]:
    """A quantizer after two training steps, and a latent for it."""
    torch.manual_seed(0)
    quantizer = options.build().train()
    for _ in range(2):
        quantizer(torch.randn(2, 4, 4, quantizer.dim))
    return quantizer, torch.randn(2, 4, 4, quantizer.dim)


def test_all_are_here() -> None:
    components = [registry().component("quantizer", name) for name in registry().names("quantizer")]
    ours = {component.name for component in components if component.target.startswith("smalti.quant.")}
    assert {options.name for options in EVERY} == ours


@every
def test_options_are_found_by_name(options: QuantizerOptions) -> None:
    assert registry().options("quantizer", options.name) is type(options)


@every
def test_an_empty_batch_is_fine_in_evaluation(options: QuantizerOptions) -> None:
    quantizer = options.build().eval()
    quantized = quantizer(torch.zeros(0, 4, 4, quantizer.dim))
    layout = quantizer.layout((4, 4))
    assert quantized.latent.shape == (0, 4, 4, quantizer.dim)
    assert quantized.tokens.shape == (0, layout.positions, layout.streams)
    assert quantizer.decode(quantized.tokens, (4, 4)).shape == quantized.latent.shape


@every
def test_the_order_in_memory_does_not_matter(options: QuantizerOptions) -> None:
    quantizer, latent = _trained(options)
    permuted = latent.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    quantized, expected = quantizer.eval()(permuted), quantizer(latent)
    assert torch.equal(quantized.tokens, expected.tokens)
    torch.testing.assert_close(quantized.latent, expected.latent)


@every
def test_autocast_trains_on_the_codes_of_float32(options: QuantizerOptions) -> None:
    quantizer, latent = _trained(options)
    latent = latent.bfloat16()
    twin = copy.deepcopy(quantizer)
    torch.manual_seed(1)
    expected = twin(latent.float())
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(latent)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.latent, expected.latent)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(quantizer.state_dict()[name], tensor), name


@every
def test_a_frozen_one_stays_to_the_last_bit_while_the_encoder_learns(options: QuantizerOptions) -> None:
    quantizer, latent = _trained(options)
    quantizer.eval().requires_grad_(False)
    before = copy.deepcopy(quantizer.state_dict())
    encoder = nn.Linear(quantizer.dim, quantizer.dim)
    model = nn.Sequential(encoder, quantizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    start = encoder.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (model(latent).latent - latent).square().sum().backward()
        optimizer.step()
    assert not torch.equal(encoder.weight, start)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@every
@pytest.mark.parametrize("training", [False, True])
def test_compiles_into_one_graph(options: QuantizerOptions, training: bool) -> None:
    quantizer, latent = _trained(options)
    twin = copy.deepcopy(quantizer).train(training)
    torch.compiler.reset()
    torch.manual_seed(1)
    found = torch.compile(quantizer.train(training), fullgraph=True, backend="eager")(latent)
    torch.manual_seed(1)
    expected = twin(latent)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.latent, expected.latent)
    torch.testing.assert_close(found.losses, expected.losses)


@every
def test_gradients_of_losses_are_those_of_finite_differences(
    options: QuantizerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer, latent = _trained(options)
    quantizer = quantizer.double()
    # A token that takes the place of a dead code moves it, which no gradient knows of.
    monkeypatch.setattr(CodebookLearning, "prepare", lambda *_: None)

    def losses(some: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        twin = copy.deepcopy(quantizer)  # what a step learns would change the next one
        # Those of codes and of straight-through outputs are not differentiable in the latent.
        of_codes = ("codebook", "double", "disentanglement")
        kept = {name: loss for name, loss in twin(some).losses.items() if name not in of_codes}
        return (some.sum(), *kept.values())

    assert torch.autograd.gradcheck(losses, (latent[:1].double().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("build", [VectorQuantizerOptions, SimVQOptions, IndexBackpropagationOptions, GumbelOptions])
def test_large_codebooks_never_meet_all_tokens_at_once(build: Callable[..., Any], largest: Any) -> None:
    size, extra = 2**18, {"entropy_weight": 0.1} if build is VectorQuantizerOptions else {}
    quantizer = build(dim=2, codebook_size=size, **extra).build().train()
    latent = torch.randn(1, 64, 2, requires_grad=True)
    with largest:
        quantized = quantizer(latent)
        (quantized.latent.sum() + sum(quantized.losses.values())).backward()
    assert size <= largest.elements <= 64 * size // 4
