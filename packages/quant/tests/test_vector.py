"""Vector quantization: values, gradients, decoding, estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.quant.entropy import affinity_entropy_plain
from smalti.quant.estimators import rotation_trick
from smalti.quant.vector import VectorQuantizer

COSINES: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"cosine": True},
    "codes": {"cosine": True, "unit_length": "codes"},
    "search": {"cosine": True, "unit_length": "search"},
}

Build = Callable[..., VectorQuantizer]


def _plain(quantizer: VectorQuantizer, latent: Tensor, codebook: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and losses from the formulas, with autograd doing the rest."""
    options = quantizer.options
    unit_z, unit_e = latent / latent.norm(dim=-1, keepdim=True), codebook / codebook.norm(dim=-1, keepdim=True)
    z = unit_z if options.cosine and options.unit_length == "all" else latent
    e = unit_e if options.cosine and options.unit_length != "search" else codebook
    searched_z, searched_e = (unit_z, unit_e) if options.cosine else (latent, codebook)
    distances = ((searched_z[..., None, :] - searched_e) ** 2).sum(-1)
    q = e[distances.argmin(-1)]
    losses = {"commitment": options.commitment_weight * ((q.detach() - z) ** 2).mean()}
    if options.update == "loss":
        losses["codebook"] = options.codebook_weight * ((q - z.detach()) ** 2).mean()
    if options.entropy_weight:
        entropies = affinity_entropy_plain(-distances.flatten(0, -2), options.entropy_temperature)
        losses["entropy"] = options.entropy_weight * entropies.loss(options.sample_weight, options.batch_weight)
    if options.orthogonal_weight:
        losses["orthogonal"] = options.orthogonal_weight * ((unit_e @ unit_e.t()) ** 2).mean()
        losses["orthogonal"] = losses["orthogonal"] - options.orthogonal_weight / len(codebook)
    return z + (q - z).detach(), losses


@pytest.mark.parametrize("cosine", COSINES)
@pytest.mark.parametrize(
    "options",
    [
        {"update": "loss"},
        {"update": "ema"},
        {
            "entropy_weight": 0.4,
            "sample_weight": 0.8,
            "batch_weight": 0.6,
            "entropy_temperature": 0.5,
            "orthogonal_weight": 2.0,
        },
        {"update": "ema", "entropy_weight": 0.4, "entropy_temperature": 0.5},
    ],
)
def test_values_and_gradients_equal_the_plain_twin(
    build_vq: Build,
    spread: Build,
    cosine: str,
    options: dict[str, Any],
) -> None:
    quantizer = spread(build_vq(**COSINES[cosine], **options, commitment_weight=0.3, codebook_weight=0.7))
    codebook = quantizer.codebook.detach().clone().requires_grad_(quantizer.options.update == "loss")
    latent, probe = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    twin_latent = latent.detach().clone().requires_grad_()
    quantized = quantizer.train()(latent)
    output, losses = _plain(quantizer, twin_latent, codebook)

    torch.testing.assert_close(quantized.latent, output)
    assert quantized.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(quantized.losses[name], loss)

    ((quantized.latent * probe).sum() + sum(quantized.losses.values())).backward()
    ((output * probe).sum() + sum(losses.values())).backward()
    torch.testing.assert_close(latent.grad, twin_latent.grad)
    if quantizer.options.update == "loss":
        torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)


@pytest.mark.parametrize("cosine", COSINES)
def test_distances_are_those_of_the_search(build_vq: Build, spread: Build, cosine: str) -> None:
    quantizer = spread(build_vq(**COSINES[cosine])).eval()
    latent = torch.randn(2, 3, 5, 4)
    distances = quantizer.distances(latent)
    assert distances.shape == (2, 15, 16)
    assert torch.equal(distances.argmin(-1, keepdim=True), quantizer(latent).tokens)
    z, e = latent.view(2, 15, 1, 4), quantizer.codebook
    if COSINES[cosine]:
        torch.testing.assert_close(1 - distances / 2, torch.cosine_similarity(z, e, dim=-1), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(distances, (z - e).square().sum(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_of_the_losses_are_those_of_finite_differences(build_vq: Build, spread: Build, cosine: bool) -> None:
    quantizer = spread(build_vq(cosine=cosine)).double().train()
    latent = torch.randn(1, 6, 4, dtype=torch.float64)

    def commitment(latent: Tensor) -> Tensor:
        return quantizer(latent).losses["commitment"]

    def codebook(codes: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer, {"codebook": codes}, (latent,)).losses["codebook"]

    # Both hold only while no token changes its code, which steps of 1e-6 do not bring about.
    assert torch.autograd.gradcheck(commitment, (latent.requires_grad_(),))
    latent.requires_grad_(False)
    assert torch.autograd.gradcheck(codebook, (quantizer.codebook.detach().clone().requires_grad_(),))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_gives_the_bits_of_forward(build_vq: Build, spread: Build, cosine: bool, dtype: torch.dtype) -> None:
    quantizer = spread(build_vq(cosine=cosine, dim=5, codebook_size=300)).to(dtype).eval()
    quantized = quantizer(torch.randn(4, 9, 9, 5, dtype=dtype))
    assert quantized.latent.dtype == dtype
    assert torch.equal(quantizer.decode(quantized.tokens, (9, 9)), quantized.latent)


def test_decode_gives_the_bits_of_forward_under_autocast(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(cosine=True)).eval()
    latent = torch.randn(4, 9, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(latent)
        decoded = quantizer.decode(quantized.tokens, (9,))
    expected = quantizer(latent.float())
    assert quantized.latent.dtype == torch.float32
    assert torch.equal(decoded, quantized.latent)
    assert torch.equal(quantized.tokens, expected.tokens)
    assert torch.equal(quantized.latent, expected.latent)


def test_rotation_takes_the_place_of_the_straight_through_gradient(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(estimator="rotation")).train()
    latent, probe = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4)
    quantized = quantizer(latent)
    (quantized.latent * probe).sum().backward()
    twin = latent.detach().clone().requires_grad_()
    (rotation_trick(twin, quantized.latent.detach()) * probe).sum().backward()
    assert torch.equal(latent.grad, twin.grad)
    assert not torch.equal(latent.grad, probe)


def test_diveq_learns_codes_from_the_task_alone(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(estimator="diveq", commitment_weight=0, codebook_weight=0)).train()
    latent = torch.randn(2, 9, 4)
    quantized = quantizer(latent)
    assert not torch.equal(quantized.latent, quantizer.decode(quantized.tokens, (9,)))
    quantized.latent.square().sum().backward()
    used = quantized.tokens.unique()
    assert bool((quantizer.codebook.grad[used] != 0).any(1).all())
    assert torch.equal(quantizer.eval()(latent).latent, quantizer.decode(quantized.tokens, (9,)))


def test_stochastic_codes_follow_their_temperature_in_training_only(build_vq: Build, spread: Build) -> None:
    shares = {}
    for temperature in (1e-6, 5.0):
        quantizer = spread(build_vq(stochastic_temperature=temperature))
        latent = torch.randn(4, 25, 4)
        nearest = quantizer.eval()(latent).tokens
        assert torch.equal(nearest, quantizer(latent).tokens)
        first, second = (quantizer.train()(latent).tokens for _ in range(2))
        shares[temperature] = (first == nearest).float().mean()
        assert torch.equal(first, second) == (temperature == 1e-6)
    assert shares[1e-6] == 1 > 0.8 > shares[5.0]


def test_gumbel_reaches_every_code_and_has_the_value_of_the_drawn_one(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(estimator="gumbel", stochastic_temperature=2.0, codebook_weight=0)).train()
    latent = torch.randn(2, 9, 4, requires_grad=True)
    quantized = quantizer(latent)
    quantized.latent.square().sum().backward()
    assert torch.equal(quantized.latent, quantizer.decode(quantized.tokens, (9,)))
    assert bool((quantizer.codebook.grad != 0).any(1).all())
    assert bool((latent.grad != 0).all())


@pytest.mark.parametrize(
    "options",
    [
        {"initialise": "normal"},
        {"cosine": True, "estimator": "rotation", "entropy_weight": 0.1},
        {"update": "ema", "affine": True},
        {"initialise": "data", "revive_after": 1},
        {"update": "ema", "initialise": "data", "revive_below": 2},
    ],
)
def test_compiles_into_one_graph(build_vq: Build, options: dict[str, Any]) -> None:
    quantizer = build_vq(**options).train()
    twin = build_vq(**options).train()
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        latent = torch.randn(2, 20, 4)
        found, expected = compiled(latent), twin(latent)
        assert torch.equal(found.latent, expected.latent)
        assert torch.equal(found.tokens, expected.tokens)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(quantizer.state_dict()[name], tensor), name


def test_unit_length_is_that_of_torch(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(cosine=True)).eval()
    latent = torch.zeros(1, 1, 4)
    assert bool(torch.isfinite(quantizer(latent).latent).all())
    torch.testing.assert_close(
        quantizer.decode(torch.tensor([[[3]]]), (1,)), F.normalize(quantizer.codebook[3], dim=0).view(1, 1, 4)
    )
