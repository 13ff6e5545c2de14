"""Looks at held-out images in training use what is installed: metrics and features of smalti-eval."""

import pytest

from smalti.core.contracts import Features
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import read_images
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.training.validator import Validator
from smalti.eval.classifier import Architecture, Classifier
from smalti.eval.frechet import GaussianStatistics, frechet_distance


def test_periodic_rfid_with_registered_features(tmp_path):
    """Their distance is that of `smalti evaluate`, with fewer images than features and with more."""
    Classifier(Architecture(classes=10, image_size=8, width=4)).save_pretrained(tmp_path / "classifier")
    assert "classifier" in registry().names("features")
    features: Features = Classifier.from_pretrained(tmp_path / "classifier")
    for images in (3, 24):
        chosen = f"{{name: classifier, folder: {tmp_path / 'classifier'}}}"
        validation = f"{{images: {images}, batch_size: 8, features: {chosen}, best: {{metric: rfid, prefer: lower}}}}"
        recipe = load_recipe("quickstart", [f"train.tokenizer.validation={validation}"])
        tokenizer, dataset = recipe.tokenizer.build().eval(), recipe.data.validation.build()
        look = Validator(
            recipe.train.tokenizer.validation,
            tokenizer,
            dataset,
            run=RunFolder(tmp_path / "run"),
            stage="train",
            reporter=Reporter(quiet=True),
            max_undecodable=0,
        )
        found = look(1, None, None)["weights"]
        assert {"psnr", "ssim", "rfid"} <= found.keys()
        real, made = GaussianStatistics(), GaussianStatistics()
        (batch, *_) = read_images(dataset, tokenizer.preprocessing, images, 0, images, max_undecodable=0, warn=print)
        copies = tokenizer.decode(tokenizer.encode(batch.images))
        for statistics, pictures in ((real, batch.images), (made, copies)):
            statistics.update(features(to_uint8(pictures))["pool"].detach())
        assert found["rfid"] == pytest.approx(frechet_distance(real, made), rel=1e-4, abs=1e-6)
