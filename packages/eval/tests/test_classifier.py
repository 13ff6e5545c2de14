import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from smalti.core.data.loader import Batch
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.eval.classifier import Architecture, Classifier, ClassifierOptions
from smalti.eval.classifier_training import ClassifierTask, ClassifierTraining, augmented


def pixels(count=5, side=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("image_size", "width", "pooled"), [(8, 4, 4), (16, 6, 12), (32, 4, 16), (64, 4, 16)])
def test_features_have_the_shapes_of_the_contract(image_size, width, pooled):
    classifier = Classifier(Architecture(classes=7, image_size=image_size, width=width)).eval()
    features = classifier(pixels(side=image_size))
    assert features["pool"].shape == (5, pooled)
    assert features["logits"].shape == (5, 7)
    torch.testing.assert_close(features["logits"], classifier.head(features["pool"]))
    one_by_one = torch.cat([classifier(image[None])["pool"] for image in pixels(side=image_size)])
    torch.testing.assert_close(one_by_one, features["pool"])


def test_gradients_reach_every_weight():
    classifier = Classifier(Architecture(classes=3, width=4)).train()
    classifier(pixels())["logits"].square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in classifier.parameters())


def test_saved_and_loaded_through_the_registry(tmp_path):
    torch.manual_seed(0)
    classifier = Classifier(Architecture(classes=4, width=4)).eval()
    classifier.save_pretrained(tmp_path)
    options = registry().options("features", "classifier").model_validate({"folder": str(tmp_path)})
    assert isinstance(options, ClassifierOptions)
    loaded = options.build()
    assert not loaded.training
    assert loaded.fingerprint == classifier.fingerprint
    torch.testing.assert_close(loaded(pixels()), classifier(pixels()), rtol=0, atol=0)
    with torch.no_grad():
        loaded.head.bias[0] += 1
    assert loaded.fingerprint != classifier.fingerprint


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"kind": "tokenizer"}))
    with pytest.raises(UserError) as error:
        ClassifierOptions(folder=tmp_path).build()
    assert str(error.value) == f"{tmp_path} does not hold a classifier, its config.json says kind 'tokenizer'"


def test_floats_are_no_pixels():
    with pytest.raises(UserError) as error:
        Classifier(Architecture(classes=2, width=4))(torch.zeros(1, 32, 32, 3))
    assert str(error.value) == "images must be uint8 (B, H, W, 3), got torch.float32 (1, 32, 32, 3)"


def test_one_class_is_no_choice():
    with pytest.raises(ValidationError, match="classes"):
        Architecture(classes=1)


def test_augmented_images_are_moved_and_mirrored_originals():
    images = pixels(count=40, side=8)
    torch.manual_seed(0)
    moved = augmented(images, 2, flip=True)
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    seen = set()
    for image, original in zip(moved.numpy(), padded, strict=True):
        variants = {
            (top, left, mirrored): original[top : top + 8, left : left + 8][:, :: -1 if mirrored else 1]
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
        }
        found = [name for name, variant in variants.items() if np.array_equal(variant, image)]
        assert found
        seen.update(found)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}
    assert torch.equal(augmented(images, 0, flip=False), images)


def test_the_objective_is_smoothed_cross_entropy():
    options = ClassifierTraining(shift=0, flip=False, dropout=0, label_smoothing=0.1, width=4)
    torch.manual_seed(0)
    classifier = Classifier(Architecture(classes=3, width=4, dropout=0)).train()
    images, labels = pixels(), torch.tensor([0, 1, 2, 1, 0])
    batch = Batch(images.permute(0, 3, 1, 2).float() / 127.5 - 1, labels, [])
    ((name, losses),) = ClassifierTask(classifier, options).objectives({"classifier": classifier}, batch, 0)
    logs = classifier(images)["logits"].log_softmax(1)
    targets = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
    assert name == "classifier"
    torch.testing.assert_close(losses, {"cross_entropy": -(targets * logs).sum(1).mean()})
