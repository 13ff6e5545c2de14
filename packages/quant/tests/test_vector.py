"""Vector quantization: values, gradients, learning of codes, and what it says to wrong inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.quant.entropy import affinity_entropy_plain
from smalti.quant.estimators import rotation_trick
from smalti.quant.lookup import nearest_code_plain
from smalti.quant.vector import VectorQuantizer, VectorQuantizerOptions


def _build(**options: Any) -> VectorQuantizer:
    torch.manual_seed(0)
    return VectorQuantizerOptions(**{"dim": 4, "codebook_size": 16, **options}).build()


def _place(quantizer: VectorQuantizer, codes: Tensor) -> VectorQuantizer:
    """Put the codes at `codes`."""
    with torch.no_grad():
        quantizer.codebook.copy_(codes)
    if quantizer.options.update == "ema":
        quantizer.ema.sums.copy_(codes)
    return quantizer


def _spread(quantizer: VectorQuantizer) -> VectorQuantizer:
    """Codes as far apart as the latents are, so that many are used."""
    return _place(quantizer, torch.randn(quantizer.codebook.shape))


COSINES: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"cosine": True},
    "codes": {"cosine": True, "unit_length": "codes"},
    "search": {"cosine": True, "unit_length": "search"},
}


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
def test_values_and_gradients_equal_the_plain_twin(cosine: str, options: dict[str, Any]) -> None:
    quantizer = _spread(_build(**COSINES[cosine], **options, commitment_weight=0.3, codebook_weight=0.7))
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
def test_distances_are_those_of_the_search(cosine: str) -> None:
    quantizer = _spread(_build(**COSINES[cosine])).eval()
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
def test_gradients_of_the_losses_are_those_of_finite_differences(cosine: bool) -> None:
    quantizer = _spread(_build(cosine=cosine)).double().train()
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
def test_decode_gives_the_bits_of_forward(cosine: bool, dtype: torch.dtype) -> None:
    quantizer = _spread(_build(cosine=cosine, dim=5, codebook_size=300)).to(dtype).eval()
    quantized = quantizer(torch.randn(4, 9, 9, 5, dtype=dtype))
    assert quantized.latent.dtype == dtype
    assert torch.equal(quantizer.decode(quantized.tokens, (9, 9)), quantized.latent)


def test_decode_gives_the_bits_of_forward_under_autocast() -> None:
    quantizer = _spread(_build(cosine=True)).eval()
    latent = torch.randn(4, 9, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantized = quantizer(latent)
        decoded = quantizer.decode(quantized.tokens, (9,))
    expected = quantizer(latent.float())
    assert quantized.latent.dtype == torch.float32
    assert torch.equal(decoded, quantized.latent)
    assert torch.equal(quantized.tokens, expected.tokens)
    assert torch.equal(quantized.latent, expected.latent)


def test_autocast_does_not_change_training() -> None:
    latent = torch.randn(4, 9, 4).bfloat16()
    plain, cast = (_build(update="ema", initialise="data").train() for _ in range(2))
    expected = plain(latent.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cast(latent)
    assert torch.equal(found.losses["commitment"], expected.losses["commitment"])
    assert torch.equal(cast.codebook, plain.codebook)


def test_an_empty_batch_is_fine_in_evaluation() -> None:
    quantizer = _build().eval()
    quantized = quantizer(torch.zeros(0, 3, 3, 4))
    assert quantized.tokens.shape == (0, 9, 1)
    assert quantizer.decode(quantized.tokens, (3, 3)).shape == (0, 3, 3, 4)


def test_ema_moves_codes_to_their_tokens_and_has_no_parameters() -> None:
    quantizer = _spread(_build(update="ema", ema_decay=0.5)).train()
    assert not list(quantizer.parameters())
    latent = torch.randn(8, 25, 4)
    errors = [quantizer(latent).losses["commitment"].item() for _ in range(60)]
    assert errors[-1] < 0.8 * errors[0]
    quantized = quantizer.eval()(latent)
    for code in quantized.tokens.unique().tolist():
        mean = latent.flatten(0, 1)[quantized.tokens.flatten() == code].mean(0)
        torch.testing.assert_close(quantizer.codebook[code], mean, rtol=1e-2, atol=1e-2)


def test_cosine_ema_keeps_codes_of_unit_length() -> None:
    quantizer = _build(update="ema", cosine=True, ema_decay=0.5).train()
    before = quantizer.codebook.clone()
    quantizer(torch.randn(8, 25, 4))
    assert not torch.equal(quantizer.codebook, before)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_initialising_by_data_uses_every_code_from_the_first_batch_on(update: str) -> None:
    latent = 100 + torch.randn(8, 25, 4)
    data, uniform = (_build(update=update, initialise=name).train() for name in ("data", "uniform"))
    first = data(latent)
    assert len(first.tokens.unique()) == 16
    assert first.losses["commitment"] < 1e-3 * uniform(latent).losses["commitment"]
    assert bool(data.initialised)
    again = data.codebook.detach().clone()
    data.eval()(-latent)
    assert torch.equal(data.codebook, again)


def test_initialising_by_data_happens_once() -> None:
    quantizer = _build(initialise="data").train()
    quantizer(torch.randn(8, 25, 4))
    codebook = quantizer.codebook.detach().clone()
    quantizer(100 + torch.randn(8, 25, 4))
    assert torch.equal(quantizer.codebook, codebook)


def test_evaluation_before_training_does_not_initialise() -> None:
    quantizer = _build(initialise="data").eval()
    codebook = quantizer.codebook.detach().clone()
    quantizer(torch.randn(8, 25, 4))
    assert torch.equal(quantizer.codebook, codebook)
    assert not bool(quantizer.initialised)


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_a_code_is_revived_after_exactly_so_many_unused_batches(update: str) -> None:
    quantizer = _build(update=update, revive_after=3, codebook_size=2, dim=1).train()
    _place(quantizer, torch.tensor([[0.0], [1000.0]]))
    batches = [torch.full((1, 4, 1), float(value)) for value in (1, 2, 3, 4)]
    for batch in batches[:3]:
        assert quantizer(batch).tokens.flatten().tolist() == [0] * 4
    assert quantizer.revival.unused.tolist() == [0, 3]
    assert quantizer(batches[3]).tokens.flatten().tolist() == [1] * 4
    assert quantizer.revival.unused.tolist() == [1, 0]
    assert quantizer.codebook[1].item() == pytest.approx(4.0, rel=1e-4)


def test_every_revival_draws_anew() -> None:
    quantizer = _build(revive_after=1, codebook_size=2, dim=1).train()
    batch, drawn = torch.arange(100.0).view(1, 100, 1), set()
    for _ in range(5):
        quantizer.revival.unused.copy_(torch.tensor([0, 1]))
        quantizer(batch)
        drawn.add(quantizer.codebook[1].item())
    assert len(drawn) > 2
    assert drawn <= set(range(100))


def test_a_code_in_use_is_never_revived() -> None:
    quantizer = _place(_build(revive_after=1, codebook_size=2, dim=1).train(), torch.tensor([[0.0], [10.0]]))
    for _ in range(5):
        quantizer(torch.tensor([[[1.0], [11.0]]]))
    assert quantizer.codebook.flatten().tolist() == [0.0, 10.0]


def test_revival_between_forward_and_backward_does_no_harm() -> None:
    quantizer = _build(revive_after=1, cosine=True).train()
    first, second = (quantizer(torch.randn(2, 3, 4)) for _ in range(2))
    torch.stack([*first.losses.values(), *second.losses.values()]).sum().backward()
    assert quantizer.codebook.grad is not None
    assert bool(quantizer.codebook.grad.any())


def test_revival_raises_usage() -> None:
    used = {}
    for revive_after in (None, 2):
        quantizer = _build(revive_after=revive_after, codebook_size=64, update="ema").train()
        for _ in range(10):
            quantizer(3 + torch.randn(8, 25, 4))
        used[revive_after] = len(quantizer.eval()(3 + torch.randn(8, 25, 4)).tokens.unique())
    assert used[2] > 40 > used[None]


def test_a_code_is_revived_at_once_when_its_count_falls_below() -> None:
    quantizer = _build(update="ema", ema_decay=0.5, revive_below=0.3, codebook_size=2, dim=1).train()
    _place(quantizer, torch.tensor([[0.0], [1000.0]]))
    counts = []
    for value in (1.0, 2.0, 3.0):
        quantizer(torch.full((1, 4, 1), value))
        counts.append(quantizer.ema.counts[1].item())
    assert counts == [0.5, pytest.approx(0.3), pytest.approx(0.15 + 2)]
    assert quantizer.codebook[1].item() == pytest.approx((0.15 * 2 + 2 * 3) / 2.15, rel=1e-3)


def test_data_initialises_the_statistics_with_the_sizes_of_the_clusters() -> None:
    quantizer = _build(update="ema", ema_decay=0.5, initialise="data", codebook_size=2, dim=1).train()
    quantizer(torch.tensor([[[0.0], [10.0], [12.0], [14.0]]]))
    order = quantizer.codebook.flatten().argsort()
    torch.testing.assert_close(quantizer.ema.counts[order], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(quantizer.ema.sums.flatten()[order], torch.tensor([0.0, 36.0]))


def test_without_smoothing_only_codes_in_use_are_rewritten() -> None:
    quantizer = _spread(_build(update="ema", ema_decay=0.5, ema_smoothing=False)).train()
    before, latent = quantizer.codebook.clone(), torch.randn(1, 5, 4)
    used = quantizer(latent).tokens.unique()
    idle = torch.ones(16, dtype=torch.bool).index_fill(0, used, False)
    assert torch.equal(quantizer.codebook[idle], before[idle])
    torch.testing.assert_close(quantizer.codebook[used], (quantizer.ema.sums / quantizer.ema.counts[:, None])[used])
    assert not bool((quantizer.codebook[used] == before[used]).any())


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_nothing_updates_stay_to_the_last_bit(cosine: bool) -> None:
    quantizer = _build(update="none", initialise="normal", cosine=cosine).train()
    before = quantizer.codebook.clone()
    assert not list(quantizer.parameters())
    losses = [quantizer(torch.randn(2, 9, 4)).losses for _ in range(3)]
    assert {name for terms in losses for name in terms} == {"commitment"}
    assert torch.equal(quantizer.codebook, before)


def test_rotation_takes_the_place_of_the_straight_through_gradient() -> None:
    quantizer = _spread(_build(estimator="rotation")).train()
    latent, probe = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4)
    quantized = quantizer(latent)
    (quantized.latent * probe).sum().backward()
    twin = latent.detach().clone().requires_grad_()
    (rotation_trick(twin, quantized.latent.detach()) * probe).sum().backward()
    assert torch.equal(latent.grad, twin.grad)
    assert not torch.equal(latent.grad, probe)


def test_diveq_learns_codes_from_the_task_alone() -> None:
    quantizer = _spread(_build(estimator="diveq", commitment_weight=0, codebook_weight=0)).train()
    latent = torch.randn(2, 9, 4)
    quantized = quantizer(latent)
    assert not torch.equal(quantized.latent, quantizer.decode(quantized.tokens, (9,)))
    quantized.latent.square().sum().backward()
    used = quantized.tokens.unique()
    assert bool((quantizer.codebook.grad[used] != 0).any(1).all())
    assert torch.equal(quantizer.eval()(latent).latent, quantizer.decode(quantized.tokens, (9,)))


def test_stochastic_codes_follow_their_temperature_in_training_only() -> None:
    shares = {}
    for temperature in (1e-6, 5.0):
        quantizer = _spread(_build(stochastic_temperature=temperature))
        latent = torch.randn(4, 25, 4)
        nearest = quantizer.eval()(latent).tokens
        assert torch.equal(nearest, quantizer(latent).tokens)
        first, second = (quantizer.train()(latent).tokens for _ in range(2))
        shares[temperature] = (first == nearest).float().mean()
        assert torch.equal(first, second) == (temperature == 1e-6)
    assert shares[1e-6] == 1 > 0.8 > shares[5.0]


def test_gumbel_reaches_every_code_and_has_the_value_of_the_drawn_one() -> None:
    quantizer = _spread(_build(estimator="gumbel", stochastic_temperature=2.0, codebook_weight=0)).train()
    latent = torch.randn(2, 9, 4, requires_grad=True)
    quantized = quantizer(latent)
    quantized.latent.square().sum().backward()
    assert torch.equal(quantized.latent, quantizer.decode(quantized.tokens, (9,)))
    assert bool((quantizer.codebook.grad != 0).any(1).all())
    assert bool((latent.grad != 0).all())


def test_affine_codes_follow_the_tokens_although_none_is_chosen() -> None:
    quantizer = _build(affine=True, update="ema").train()
    latent = 100 + 10 * torch.randn(4, 25, 4)
    usage = len(quantizer(latent).tokens.unique())
    plain = len(_build(update="ema").train()(latent).tokens.unique())
    assert usage > 10 > plain
    for _ in range(20):
        quantizer(latent)
    codes = quantizer.eval()(latent).latent.detach()
    assert (codes - latent).square().mean() < 0.5 * latent.var()


def test_given_tokens_take_the_place_of_the_search() -> None:
    quantizer = _spread(_build(update="ema", ema_decay=0.5)).train()
    before, latent = quantizer.codebook.clone(), torch.randn(2, 3, 3, 4)
    tokens = torch.full((2, 9, 1), 5)
    quantized = quantizer(latent, tokens)
    assert torch.equal(quantized.tokens, tokens)
    assert torch.equal(quantized.latent, before[5].expand(2, 3, 3, 4))
    torch.testing.assert_close(quantizer.ema.counts[[4, 5]], torch.tensor([0.5, 0.5 + 0.5 * 18]))
    with pytest.raises(UserError) as error:
        quantizer(latent, tokens + 11)
    assert str(error.value) == "token 16 of stream 0 is out of range: there are 16 codes, 0 to 15"


def test_deferred_learning_averages_in_turn_and_writes_once() -> None:
    quantizer = _spread(_build(update="ema", revive_after=3)).train()
    before, expected = quantizer.codebook.clone(), copy.deepcopy(quantizer.ema)
    parts = torch.randn(4, 9, 4).split((1, 3))
    hits = torch.zeros(len(before), dtype=torch.int64)
    with quantizer.deferred():
        for latent in parts:
            tokens = quantizer(latent).tokens.flatten()
            assert torch.equal(tokens, nearest_code_plain(latent.flatten(0, 1), before))
            assert torch.equal(quantizer.codebook, before)
            expected.update(tokens, latent.flatten(0, 1))
            hits += torch.bincount(tokens, minlength=len(before))
    torch.testing.assert_close(quantizer.codebook, expected.codebook())
    torch.testing.assert_close(quantizer.ema.counts, expected.counts)
    assert torch.equal(quantizer.revival.unused == 0, hits > 0)


def test_a_failed_deferral_learns_nothing() -> None:
    quantizer = _spread(_build(update="ema")).train()
    before = quantizer.codebook.clone()
    with pytest.raises(UserError), quantizer.deferred():
        quantizer(torch.cat([quantizer(torch.randn(1, 9, 4)).latent] * 2, dim=2))
    assert torch.equal(quantizer.codebook, before)
    quantizer(torch.randn(1, 9, 4))
    assert not torch.equal(quantizer.codebook, before)


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
def test_compiles_into_one_graph(options: dict[str, Any]) -> None:
    quantizer = _build(**options).train()
    twin = _build(**options).train()
    torch._dynamo.reset()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        latent = torch.randn(2, 20, 4)
        found, expected = compiled(latent), twin(latent)
        assert torch.equal(found.latent, expected.latent)
        assert torch.equal(found.tokens, expected.tokens)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(quantizer.state_dict()[name], tensor), name


def test_is_registered() -> None:
    options = registry().options("quantizer", "vq").model_validate({"name": "vq", "dim": 4, "codebook_size": 8})
    assert isinstance(options.build(), VectorQuantizer)


@pytest.mark.parametrize(
    ("latent", "sentence"),
    [
        (torch.zeros(2, 9, 5), "got torch.float32 (2, 9, 5)"),
        (torch.zeros(2, 3, 3, 4, dtype=torch.int64), "got torch.int64 (2, 3, 3, 4)"),
        (torch.zeros(9, 4), "got torch.float32 (9, 4)"),
    ],
)
def test_wrong_latents_are_told(latent: Tensor, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        _build()(latent)
    assert str(error.value) == f"the latent must be float (B, L, 4) or (B, h, w, 4), {sentence}"


def test_an_empty_training_batch_is_told() -> None:
    with pytest.raises(UserError) as error:
        _build().train()(torch.zeros(0, 9, 4))
    assert str(error.value) == "a training batch needs at least one token, got a latent of (0, 9, 4)"


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.full((1, 9, 1), 16), "token 16 of stream 0 is out of range: there are 16 codes, 0 to 15"),
        (torch.full((1, 9, 1), -1), "token -1 of stream 0 is out of range: there are 16 codes, 0 to 15"),
        (torch.zeros(1, 9, dtype=torch.int64), "tokens must be int64 (B, L, 1), got torch.int64 (1, 9)"),
        (torch.zeros(1, 9, 2, dtype=torch.int64), "tokens must be int64 (B, L, 1), got torch.int64 (1, 9, 2)"),
        (torch.zeros(1, 9, 1), "tokens must be int64 (B, L, 1), got torch.float32 (1, 9, 1)"),
        (torch.zeros(1, 8, 1, dtype=torch.int64), "tokens of a latent space (3, 3) have 9 positions, got 8"),
    ],
)
def test_wrong_tokens_are_told(tokens: Tensor, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        _build().decode(tokens, (3, 3))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("option", "value"),
    [("codebook_size", 1), ("dim", 0), ("ema_decay", 1.0), ("revive_after", 0), ("commitment_weight", -1.0)],
)
def test_wrong_options_are_told(option: str, value: float) -> None:
    with pytest.raises(ValidationError) as error:
        VectorQuantizerOptions(**{"dim": 4, "codebook_size": 8, option: value})
    assert [line["loc"] for line in error.value.errors()] == [(option,)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unit_length": "codes"}, "unit_length 'codes' needs cosine: true"),
        ({"affine": True, "cosine": True}, "an affine codebook has no unit length: choose affine or cosine"),
        (
            {"revive_below": 2},
            "revive_below needs update: ema, whose counts it looks at, and no revive_after",
        ),
        ({"revive_after": 2, "update": "none"}, "revive_after changes codes that update: none keeps"),
        (
            {"orthogonal_weight": 1, "update": "ema"},
            "orthogonal_weight needs update: loss, nothing else follows its gradient",
        ),
        ({"estimator": "gumbel"}, "the estimator gumbel needs a stochastic_temperature"),
    ],
)
def test_options_that_contradict_each_other_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        VectorQuantizerOptions(dim=4, codebook_size=8, **options)
    assert [line["msg"] for line in error.value.errors()] == [f"Value error, {sentence}"]


def test_unit_length_is_that_of_torch() -> None:
    quantizer = _spread(_build(cosine=True)).eval()
    latent = torch.zeros(1, 1, 4)
    assert bool(torch.isfinite(quantizer(latent).latent).all())
    torch.testing.assert_close(
        quantizer.decode(torch.tensor([[[3]]]), (1,)), F.normalize(quantizer.codebook[3], dim=0).view(1, 1, 4)
    )
