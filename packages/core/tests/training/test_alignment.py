import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))

from toy_training import pairs, shared_loss

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.losses.alignment import AlignmentOptions
from smalti.core.losses.contrastive import contrastive
from smalti.core.losses.dependency import DependencyOptions
from smalti.core.losses.teacher import TeacherOptions
from smalti.core.testing.processes import run_in_processes
from smalti.core.training.frozen_vit import load_frozen_vit


@pytest.fixture
def teacher(vit_file):
    def teacher(**changes):
        return {"source": str(vit_file), "image_size": 32, **changes}

    return teacher


@pytest.fixture
def alignment(teacher, tokenizer):
    """An attached alignment to the seeded teacher, and the tokenizer."""

    def alignment(feature="class", dim=4, **options):
        options = {"teacher": teacher(feature=feature), **options}
        loss = AlignmentOptions.model_validate(options).build()
        student = tokenizer(dim=dim)
        loss.attach(student)
        return loss, student

    return alignment


def images(batch=4):
    return torch.rand(batch, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_teacher_equals_timms_network(vit_file):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    network = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=1, num_classes=0
    ).eval()
    network.load_state_dict(load_file(vit_file))
    normalised = torch.randn(2, 3, 32, 32)
    ours = load_frozen_vit(str(vit_file), image_size=32)
    with torch.no_grad():
        first, middle, last = ours(normalised, (0, 2, -1))
        expected = network.forward_intermediates(normalised, indices=[1], norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(last, network.forward_features(normalised), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(middle[:, 1:], expected.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)
    assert first.shape == (2, 17, 64)
    assert load_frozen_vit(str(vit_file), image_size=48, patch_size=16).positions.shape == (1, 10, 64)


def test_a_teacher_of_registers_and_layer_scale_leaves_the_registers_out(vit_file, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(vit_file)
    tensors["reg_token"] = torch.randn(1, 2, 64)
    tensors |= {f"blocks.{n}.ls{k}.gamma": torch.full((64,), 0.5) for n in range(3) for k in (1, 2)}
    save_file(tensors, tmp_path / "registers.safetensors")
    network = load_frozen_vit(str(tmp_path / "registers.safetensors"), image_size=32)
    (tokens,) = network(torch.randn(1, 3, 32, 32), (-1,))
    assert tokens.shape == (1, 17, 64)
    assert network.blocks[0].scale1 is not None


def test_teachers_read_class_or_patches_before_or_after_the_norm(teacher):
    built = {
        (feature, norm): TeacherOptions(**teacher(feature=feature, final_norm=norm)).build()
        for feature in ("class", "patches")
        for norm in (True, False)
    }
    found = {key: module(images()) for key, module in built.items()}
    assert found["class", True].shape == (4, 1, 64)
    assert found["patches", True].shape == (4, 16, 64)
    norm = built["class", True].network.network.norm
    torch.testing.assert_close(norm(found["class", False]), found["class", True])


def test_images_of_another_size_are_resized_as_asked(teacher):
    nearest = TeacherOptions(**teacher(resize="nearest", statistics="clip")).build()
    large = torch.rand(1, 3, 64, 64) * 2 - 1
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    expected = (large[:, :, ::2, ::2] * 0.5 + 0.5 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(nearest.prepared(large), expected)


def test_contrastive_is_cross_entropy_of_pairs():
    torch.manual_seed(0)
    first, second = torch.randn(2, 5, 7, dtype=torch.float64)
    products = 3.0 * torch.einsum("id,jd->ij", first, second)
    rows = sum(-(products[i, i] - products[i].logsumexp(0)) for i in range(5)) / 5
    columns = sum(-(products[i, i] - products[:, i].logsumexp(0)) for i in range(5)) / 5
    torch.testing.assert_close(contrastive(first, second, 3.0, both_ways=False).double(), rows, rtol=1e-5, atol=0)
    torch.testing.assert_close(contrastive(first, second, 3.0).double(), (rows + columns) / 2, rtol=1e-5, atol=0)


def test_the_mean_is_projected_and_compared_with_the_class_token(alignment, output):
    loss, _ = alignment(branches=2, branch=1, scale=2.0)
    latent = torch.randn(4, 2, 2, 4, requires_grad=True)
    value = loss(output(images(), latent=latent), images(), 0)
    predicted = F.normalize(loss.student(latent[..., 2:].mean((1, 2))), dim=-1)
    wanted = F.normalize(loss.teacher(images())[:, 0], dim=-1)
    torch.testing.assert_close(value, contrastive(predicted, wanted, 2.0))
    value.backward()
    assert bool(latent.grad[..., 2:].any())
    assert not latent.grad[..., :2].any()
    assert {name for name, _ in loss.named_parameters()} == {"student.weight", "student.bias"}
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_the_first_samples_may_be_left_out(alignment, output):
    loss, _ = alignment(leave_out=0.5)
    latent = torch.randn(4, 2, 2, 4)
    part = output(images(), latent=latent[2:])
    whole, _ = alignment()
    whole.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss(output(images(), latent=latent), images(), 0), whole(part, images()[2:], 0))


def test_the_tokenizers_own_projection_takes_the_teachers_features(teacher, output, tokenizer):
    student = tokenizer()
    student.to_codes = nn.Linear(64, 4)
    loss = AlignmentOptions.model_validate({"teacher": teacher(), "projection": "tokenizer"}).build()
    loss.attach(student)
    latent = torch.randn(4, 2, 2, 4)
    value = loss(output(images(), latent=latent), images(), 0)
    wanted = student.to_codes(loss.teacher(images())[:, 0])
    unit = [F.normalize(features, dim=-1) for features in (latent.mean((1, 2)), wanted)]
    torch.testing.assert_close(value, contrastive(*unit))
    value.backward()
    assert student.to_codes.weight.grad is not None
    assert not list(loss.parameters())  # the projection stays the tokenizer's


def test_the_head_predicts_the_class_token(alignment, output):
    loss, _ = alignment(student="head", projection="none", objective="contrastive-one-way")
    latent = torch.randn(4, 2, 2, 4, requires_grad=True)
    value = loss(output(images(), latent=latent), images(), 0)
    assert loss.predicted(latent).shape == (4, 1, 64)
    value.backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())
    assert bool(latent.grad.any())


def test_the_head_reads_the_latent_of_scales(alignment, tokenizer, monkeypatch):
    scales = TokenLayout.scales(((1, 1), (2, 2)), (16,))
    monkeypatch.setattr(type(tokenizer()), "layout", lambda self: scales)
    loss, _ = alignment(student="head", projection="none")
    assert loss.predicted(torch.randn(4, 2, 2, 4)).shape == (4, 1, 64)


def test_positions_are_compared_one_by_one(alignment, output, teacher):
    loss, _ = alignment(teacher=teacher(feature="patches", image_size=16), student="positions", objective="cosine")
    latent = torch.randn(4, 2, 2, 4)
    value = loss(output(images(), latent=latent), images(), 0)
    cosines = F.cosine_similarity(loss.student(latent.flatten(1, 2)), loss.teacher(images()), dim=-1)
    torch.testing.assert_close(value, 1 - cosines.mean())
    wrong, _ = alignment(feature="patches", student="positions", objective="cosine")
    with pytest.raises(UserError, match=r"^alignment: the latent has 4 positions, the teacher 16 patches; give the"):
        wrong(output(images(), latent=latent), images(), 0)


def test_the_scale_moves_in_a_line(alignment):
    loss, _ = alignment(final_scale=101.0, scale_steps=10)
    assert [loss.scale(step) for step in (0, 5, 10, 99)] == [1.0, 51.0, 101.0, 101.0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"branch": 2, "branches": 2}, "branch 2 is not one of 2 branches"),
        ({"student": "head"}, "the head ends in the teacher's width: it needs projection: none"),
        ({"student": "positions"}, "student: positions needs objective: cosine and a teacher with feature: patches"),
    ],
)
def test_options_that_contradict_each_other(options, sentence, teacher):
    with pytest.raises(ValidationError, match=sentence):
        AlignmentOptions.model_validate({"teacher": teacher(), **options})


def test_what_a_tokenizer_lacks_is_named(alignment, output, teacher, tokenizer):
    with pytest.raises(UserError, match=r"^alignment: the branch has width 4 and the teacher 64; choose a projection$"):
        alignment(projection="none")
    with pytest.raises(UserError, match=r"^a latent of width 4 cannot be cut into 3 branches$"):
        alignment(branches=3)
    with pytest.raises(
        UserError, match=r"^alignment: the tokenizer projects 8 to 4 channels, but the teacher has 64 a"
    ):
        alignment(projection="tokenizer")
    loss, _ = alignment()
    with pytest.raises(UserError, match=r"^the loss needs the tokenizer's feature 'latent', it gives none$"):
        loss(output(images()), images(), 0)
    with pytest.raises(UserError, match=r"no.safetensors does not exist; expected the weights of a pretrained ViT the"):
        TeacherOptions(source="/no.safetensors").build()
    with pytest.raises(UserError, match=r"an image of 30 pixels cannot be cut into patches of 8$"):
        TeacherOptions(**teacher(image_size=30)).build()


def test_composed_tokenizers_give_their_latent(tokenizer):
    student = tokenizer().train()
    found = student(torch.rand(2, 1, 8, 8) * 2 - 1)
    assert found.features["latent"].shape == (2, 2, 2, 4)
    found.features["latent"].sum().backward()
    assert student.to_codes.weight.grad is not None


def test_dependency_is_the_cosine_of_mean_branches(output, tokenizer):
    loss = DependencyOptions(branches=2).build()
    loss.attach(tokenizer())
    half = torch.randn(3, 2, 2, 2)
    same = loss(output(images(3), latent=torch.cat([half, 2 * half], -1)), images(3), 0)
    torch.testing.assert_close(same, torch.tensor(1.0))
    opposite = loss(output(images(3), latent=torch.cat([half, -half], -1)), images(3), 0)
    torch.testing.assert_close(opposite, torch.tensor(-1.0))
    with pytest.raises(UserError, match=r"^a latent of width 4 cannot be cut into 3 branches$"):
        DependencyOptions(branches=3).build().attach(tokenizer())


def test_negatives_of_all_processes_are_those_of_the_whole_batch():
    first, second = (part.clone().requires_grad_() for part in pairs())
    whole = contrastive(first, second, 2.0)
    whole.backward()
    parts = run_in_processes(shared_loss)
    for loss, *_ in parts:
        torch.testing.assert_close(loss, whole.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), first.grad)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), second.grad)
