import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))

from toy_training import Images, replica, weights

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.testing.processes import run_in_processes
from smalti.core.training import loop
from smalti.core.training.loop import train
from smalti.core.training.options import Perturbation, TokenizerTraining
from smalti.core.training.perturbation import LatentPerturbation, perturbed
from smalti.core.training.schedule import multiplier
from smalti.core.training.tasks import TokenizerTask

PATCHGAN = {"name": "patchgan", "width": 8, "layers": 1}
# Everything that has a state or draws at random.
FULL = {
    "losses": [{"name": "l2"}, {"name": "charbonnier", "weight": 0.1}],
    "ramps": {"commitment": {"end": 0.1, "steps": 6}},
    "perturbation": {"neighbours": 4, "probability": 0.5, "share": 0.5, "anneal_to": 8, "final_ratio": 0.5},
    "adversarial": {
        "discriminator": PATCHGAN,
        "start": 2,
        "discriminator_start": 1,
        "warmup_steps": 3,
        "adaptive": True,
        "objective": "vanilla",
        "generator_objective": "non-saturating",
        "lecam": {"weight": 0.1, "decay": 0.9},
        "r1": 0.1,
        "augment": {"probability": 0.7, "blur_until": 3, "blur_fade": 2},
    },
}


@pytest.fixture
def context(tmp_path):
    def context(name="run"):
        folder = RunFolder(tmp_path / name)
        folder.state.mkdir(parents=True)
        return SimpleNamespace(run=folder, recipe=SimpleNamespace(seed=1), device="cpu", reporter=Reporter(quiet=True))

    return context


def training(**changes):
    content = {"steps": 10, "batch_size": 4, "learning_rate": 0.01, "log_every": 1, "checkpoint_every": 3}
    return TokenizerTraining.model_validate({**content, "losses": [{"name": "l2"}], **changes})


def run(tokenizer, options, context):
    task = TokenizerTask(tokenizer(), options)
    averaged = train(task, Images(), options, stage="test", context=context)
    return task, averaged


@pytest.mark.parametrize(("stop", "first"), [(2, False), (5, True), (8, False)])
def test_going_on_with_everything_equals_never_stopping(tokenizer, context, monkeypatch, vit_file, stop, first):
    alignment = {"name": "alignment", "teacher": {"source": str(vit_file), "image_size": 32}, "weight": 0.1}
    adversarial = {**FULL["adversarial"], "discriminator_first": first}
    options = training(**{**FULL, "losses": [*FULL["losses"], alignment], "adversarial": adversarial})
    undisturbed, expected = run(tokenizer, options, whole := context("whole"))

    class KillError(Exception):
        """The end of a process."""

    update = loop._Loop._update

    def dying(self):
        if self.step == stop:
            raise KillError
        update(self)

    parts = context("parts")
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KillError):
            run(tokenizer, options, parts)
    resumed, averaged = run(tokenizer, options, parts)
    assert set(undisturbed.models) == {"tokenizer", "discriminator", "losses"}
    found = weights(resumed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(undisturbed).items())
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in expected.items())
    assert torch.equal(undisturbed.adversary.lecam.averages, resumed.adversary.lecam.averages)
    assert bool(resumed.adversary.lecam.averages.any())
    assert parts.run.metrics("test") == whole.run.metrics("test")


@pytest.mark.slow
def test_replicas_stay_equal_with_everything(tokenizer, tmp_path, vit_file):
    alignment = {"name": "alignment", "teacher": {"source": str(vit_file), "image_size": 32}, "weight": 0.1}
    options = training(**{**FULL, "losses": [*FULL["losses"], alignment], "batch_size": 8, "steps": 5})
    (first, averages), (second, others) = run_in_processes(replica, tokenizer(), options, str(tmp_path / "run"))
    assert torch.equal(averages, others)
    # Running statistics of the discriminator are those of a process's own images.
    assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)
    assert {name.split(".")[0] for name in first} == {"tokenizer", "discriminator", "losses"}


def test_every_part_begins_at_its_step(tokenizer, context):
    task, _ = run(tokenizer, training(**FULL), folder := context())
    lines = folder.run.metrics("test")
    begins = {name: next(line["step"] for line in lines if name in line) for name in ("adversarial", "discriminator")}
    assert begins == {"adversarial": 3, "discriminator": 2}  # lines count from 1
    assert {"l2", "charbonnier", "commitment", "lecam", "r1"} <= lines[-1].keys()
    assert set(task.models) == {"tokenizer", "discriminator"}


def test_the_discriminator_trains_as_told(tokenizer):
    options = training(
        weight_decay=0.1,
        warmup_steps=4,
        adversarial={
            "discriminator": PATCHGAN,
            "learning_rate": 0.5,
            "weight_decay": 0.0,
            "warmup_steps": 2,
            "discriminator_start": 3,
        },
    )
    task = TokenizerTask(tokenizer(), options)
    own = task.optimization("discriminator", options)
    assert (own.learning_rate, own.weight_decay, own.warmup_steps, own.steps) == (0.5, 0.0, 2, 7)
    assert (own.warmup_from, own.final_ratio) == (options.warmup_from, options.final_ratio)
    assert task.optimization("tokenizer", options) is options
    assert task.first_steps == {"discriminator": 3}


def test_the_discriminators_rate_has_a_course_of_its_own(tokenizer):
    options = training(
        steps=12,
        warmup_steps=4,
        warmup_from=0.5,
        final_ratio=0.2,
        adversarial={"discriminator": PATCHGAN, "warmup_steps": 2, "warmup_from": 0.0, "final_ratio": 0.1},
    )
    own = TokenizerTask(tokenizer(), options).optimization("discriminator", options)
    assert [multiplier(own, step) for step in (0, 1, 2, 11)] == pytest.approx([0.0, 0.5, 1.0, 0.1])
    assert [multiplier(options, step) for step in (0, 4, 11)] == pytest.approx([0.5, 1.0, 0.2])


def objectives(task, step=0, between=None):
    """What the task yields, without a loop."""
    names = []
    for learners, terms in task.objectives(task.models, next(Images()), step):
        names.append(learners)
        if between is not None:
            between(learners, terms)
    return names


def test_who_steps_first(tokenizer):
    for first in (False, True):
        task = TokenizerTask(
            tokenizer().train(), training(adversarial={"discriminator": PATCHGAN, "discriminator_first": first})
        )
        order = [("discriminator",), ("tokenizer",)]
        assert objectives(task) == (order if first else order[::-1])


def test_the_generator_is_judged_by_the_discriminator_that_has_stepped(tokenizer):
    torch.manual_seed(0)
    task = TokenizerTask(
        tokenizer().train(),
        training(adversarial={"discriminator": PATCHGAN, "discriminator_first": True, "weight": 1.0}),
    )
    found = {}

    def step(learners, terms):
        if learners == ("discriminator",):
            with torch.no_grad():
                task.models["discriminator"].blocks[-1].weight.zero_()
                task.models["discriminator"].blocks[-1].bias.fill_(3.0)
        else:
            found.update(terms)

    objectives(task, between=step)
    torch.testing.assert_close(found["adversarial"], torch.tensor(-3.0))


def test_heads_of_losses_learn_and_are_kept_apart(tokenizer, context, vit_file):
    loss = {
        "name": "alignment",
        "teacher": {"source": str(vit_file), "image_size": 32},
        "student": "head",
        "projection": "none",
    }
    options = training(losses=[{"name": "l2"}, loss], steps=3)
    before = TokenizerTask(tokenizer(), options).models["losses"].state_dict()
    task, _ = run(tokenizer, options, context())
    after = task.models["losses"].state_dict()
    assert all(name.startswith("losses.alignment.student.") for name in after)
    assert not any(torch.equal(before[name], tensor) for name, tensor in after.items() if tensor.ndim > 1)
    assert "alignment" not in str(task.models["tokenizer"].state_dict().keys())


def test_ramps_scale_the_quantizers_terms(tokenizer):
    plain, ramped = (
        TokenizerTask(tokenizer().train(), training(ramps=ramps))
        for ramps in ({}, {"commitment": {"start": 1.0, "end": 0.5, "steps": 10}})
    )
    terms = [next(task.objectives(task.models, next(Images()), 4))[1] for task in (plain, ramped)]
    torch.testing.assert_close(terms[1]["commitment"], 0.8 * terms[0]["commitment"])
    torch.testing.assert_close(terms[1]["l2"], terms[0]["l2"])


def test_a_ramp_of_no_term(tokenizer):
    task = TokenizerTask(tokenizer().train(), training(ramps={"entropy": {"end": 0.5, "steps": 10}}))
    with pytest.raises(UserError) as told:
        next(task.objectives(task.models, next(Images()), 0))
    sentence = "train.tokenizer.ramps: the tokenizer gives no term 'entropy', it gives commitment"
    assert str(told.value) == sentence


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(1, 4))
def test_perturbed_takes_the_code_of_its_rank(tokens, size, width):
    latent, quantized = torch.randn(2, tokens, width, dtype=torch.float64)
    codes = torch.randn(size, width, dtype=torch.float64)
    rank = torch.randint(size, (tokens,))
    quantized.requires_grad_()
    found = perturbed(quantized, latent, codes, rank)
    for token in range(tokens):
        order = (codes - latent[token]).float().norm(dim=1).sort(stable=True).indices
        torch.testing.assert_close(found[token].detach(), codes[order[rank[token]]])
    weights_of = torch.randn_like(found)
    (found * weights_of).sum().backward()
    torch.testing.assert_close(quantized.grad, weights_of)


def test_perturbation_touches_the_first_samples_in_training(tokenizer):
    student = tokenizer().train()
    images = next(Images()).images
    clean = student(images)
    LatentPerturbation(Perturbation(neighbours=4, share=0.5), student)
    torch.manual_seed(0)
    noisy = student(images)
    changed = (noisy.features["latent"] != clean.features["latent"]).flatten(1).any(1)
    assert changed.tolist() == [True, True, False, False]
    assert torch.equal(noisy.tokens, clean.tokens)
    assert noisy.losses == clean.losses
    student.eval()
    torch.testing.assert_close(student(images).images, student.decode(student.encode(images)), atol=1e-5, rtol=0)
    codes = noisy.features["latent"][:2].abs()
    torch.testing.assert_close(codes, torch.ones_like(codes))


def test_perturbation_anneals(tokenizer):
    options = Perturbation(neighbours=10, anneal_from=10, anneal_to=20, final_ratio=0.5)
    perturbation = LatentPerturbation(options, tokenizer())
    ratios = []
    for step in (0, 10, 15, 20, 50):
        perturbation.step = step
        ratios.append(perturbation.ratio)
    assert ratios == [1.0, 1.0, 0.75, 0.5, 0.5]
    assert LatentPerturbation(Perturbation(neighbours=10), tokenizer()).ratio == 1.0


def test_perturbation_that_anneals_backwards():
    with pytest.raises(ValidationError, match="anneal_to must not be before anneal_from, got 0 and 10"):
        Perturbation(anneal_from=10)


def test_perturbation_says_what_it_cannot_perturb(tokenizer, monkeypatch):
    with pytest.raises(UserError, match=r"^perturbation: 100 neighbours are more than the 16 codes there are$"):
        LatentPerturbation(Perturbation(), tokenizer())
    student = tokenizer()
    scales = TokenLayout.scales(((1, 1), (2, 2)), (16,))
    monkeypatch.setattr(type(student), "layout", lambda self: scales)
    with pytest.raises(
        UserError, match=r"^perturbation needs a tokenizer with a quantizer of one stream and one scale"
    ):
        LatentPerturbation(Perturbation(neighbours=2), student)


def test_the_adaptive_weight_sees_the_losses_of_images_only(tokenizer):
    torch.manual_seed(0)
    options = training(adversarial={"discriminator": PATCHGAN, "adaptive": True, "weight": 1.0})
    task = TokenizerTask(tokenizer().train(), options)
    batch = next(Images())
    _, terms = next(task.objectives(task.models, batch, 0))
    torch.manual_seed(0)
    again = TokenizerTask(tokenizer().train(), options)
    output = again.models["tokenizer"](batch.images)
    term = -again.models["discriminator"](output.images).mean()
    layer = again.adversary.weight
    norms = [
        torch.autograd.grad(value, layer, retain_graph=True)[0].norm()
        for value in (F.mse_loss(output.images, batch.images), term)
    ]
    torch.testing.assert_close(terms["adversarial"], norms[0] / (norms[1] + 1e-4) * term)
