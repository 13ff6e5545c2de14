import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from smalti.core.contracts import Features, Tokenizer
from smalti.core.data.folders import FolderOptions
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.frechet import frechet_distance_of_rows
from smalti.core.options import FeaturesOptions
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.testing.processes import run_in_processes
from smalti.core.training.options import Validation
from smalti.core.training.sharding import divided, shard
from smalti.core.training.validator import Validator


class PixelsOptions(FeaturesOptions):
    name: str = "pixels"

    def build(self):
        return Pixels()


class Pixels(Features):
    """The first pixels."""

    fingerprint = "pixels"

    def forward(self, images):
        return {"pool": images[:, :2, :2, 0].flatten(1).float()}


@pytest.fixture
def run(tmp_path):
    random = np.random.default_rng(0)
    for index in range(10):
        path = tmp_path / "images" / "only" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(path)
    return RunFolder(tmp_path / "run")


def dataset(run):
    return FolderOptions(path=str(run.path.parent / "images")).build()


def validator(model, run, **changes):
    content = {"images": 6, "batch_size": 4, "pictures": 3, "best": {"metric": "difference", "prefer": "lower"}}
    options = Validation.model_validate({**content, **changes})
    return Validator(
        options, model, dataset(run), run=run, stage="test", reporter=Reporter(quiet=True), max_undecodable=0
    )


def differences(model, run):
    """By hand."""
    (batch,) = read_images(dataset(run), model.preprocessing, 6, 0, 6, max_undecodable=0, warn=print)
    copies = to_uint8(model.decode(model.encode(batch.images))).float()
    return float((copies - to_uint8(batch.images).float()).abs().mean())


def test_both_weights_are_measured_and_the_best_are_kept(tokenizer, run):
    model, other = tokenizer().eval(), tokenizer().eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    raw, averaged = differences(model, run), differences(other, run)
    assert raw != averaged
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    look = validator(model, run)
    found = look(10, other.state_dict(), None)
    assert found["weights"]["difference"] == pytest.approx(raw, rel=1e-5)
    assert found["ema"]["difference"] == pytest.approx(averaged, rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    best = run / "tokenizer-best"
    assert json.loads((best / "best.json").read_text()) == {
        "step": 10,
        "weights": "ema",
        "difference": found["ema"]["difference"],
    }
    for ema, expected in ((True, other), (False, model)):
        saved = Tokenizer.from_pretrained(best, ema=ema).state_dict()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.state_dict().items())
    again = validator(model, run)
    again.load_state_dict(look.state_dict())
    again(20, other.state_dict(), None)  # no better
    assert json.loads((best / "best.json").read_text())["step"] == 10
    again.best = found["ema"]["difference"] + 1
    again(30, other.state_dict(), None)
    assert json.loads((best / "best.json").read_text())["step"] == 30
    picture = np.asarray(Image.open(run / "images" / "test-00000010.png"))
    assert picture.shape == (128, 6 * 128 + 5 * 2, 3)
    assert sorted(path.name for path in (run / "images").iterdir()) == [f"test-000000{n}0.png" for n in (1, 2, 3)]


def test_without_averages_pictures_and_best(tokenizer, run):
    found = validator(tokenizer(), run, pictures=0, best=None, features=PixelsOptions())(5, None, None)
    assert found.keys() == {"weights"}
    assert found["weights"].keys() == {"difference", "rfid"}
    assert not run.path.exists()


def test_images_that_are_too_small_for_a_metric(tokenizer, run, monkeypatch):
    def refuse(*_):
        raise UserError("too small")

    options = registry().options("metric", "difference")
    metric = options().build()
    monkeypatch.setattr(options, "build", lambda _: type(metric)(metric.unit, metric.definition, refuse))
    assert validator(tokenizer(), run, best=None)(5, None, None) == {"weights": {}}
    with pytest.raises(UserError) as told:
        validator(tokenizer(), run)(5, None, None)
    assert str(told.value) == (
        "train.tokenizer.validation.best: 'difference' cannot be told of images of 8 pixels, which are too small for it"
    )


def test_no_image_to_look_at(tokenizer, run):
    for path in (run.path.parent / "images" / "only").iterdir():
        path.write_bytes(b"no image")
    look = validator(tokenizer(), run)
    look.max_undecodable, look.reporter = 100, Reporter(quiet=True)
    with pytest.raises(UserError, match=r"^there is no image in images, the recipe's data.validation$"):
        look(5, None, None)


def test_the_best_distance_without_features(tokenizer, run):
    with pytest.raises(UserError) as told:
        validator(tokenizer(), run, best={"metric": "rfid", "prefer": "lower"})
    assert str(told.value) == (
        "train.tokenizer.validation.best: 'rfid' is not measured, only difference is: it needs validation.features, "
        "of which none is installed (smalti-eval brings some)"
    )


@pytest.mark.parametrize("metric", ["rfid", "lpips"])
def test_the_best_distance_is_the_lowest(metric):
    with pytest.raises(ValidationError, match=f"{metric} is a distance, .*: give prefer: lower"):
        Validation.model_validate({"best": {"metric": metric}})


def test_features_without_a_pool(tokenizer, run, monkeypatch):
    monkeypatch.setattr(Pixels, "forward", lambda _self, images: {"spatial": images.float()})
    with pytest.raises(UserError, match=r"^Pixels gives the features spatial; a Frechet distance needs pool$"):
        validator(tokenizer(), run, best=None, features=PixelsOptions())(5, None, None)


def test_features_of_a_name_that_is_not_installed():
    with pytest.raises(ValidationError, match="unknown features 'inception'; installed: none"):
        Validation.model_validate({"features": "inception"})


def test_the_best_of_what_is_not_measured(tokenizer, run):
    with pytest.raises(
        UserError, match=r"^train.tokenizer.validation.best: 'psnr' is not measured, only difference is$"
    ):
        validator(tokenizer(), run, best={})


def looked(rank, model, other, folder, sharded):
    """What one of several processes finds, before and after the weights were replaced by averages."""
    if sharded:
        shard(model, torch.device("cpu"))
    own = model.state_dict()
    averaged = {name: divided(tensor, own[name]) for name, tensor in other.items()}
    changes = {"images": 9, "batch_size": 2, "pictures": 7, "features": PixelsOptions()}
    look = validator(model, RunFolder(folder), **changes)
    return look(1, averaged, None), look(2, averaged, None), look.best, len(look._images)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["tokenizer", "autoencoder"])
def test_two_processes_find_what_one_finds(request, run, kind, sharded):
    model = request.getfixturevalue(kind)
    other = model()
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.1)
    folder = run.path.parent / "two"
    arguments = (model().eval(), other.state_dict(), str(folder), sharded)
    first, second = run_in_processes(looked, *arguments)
    expected = looked(0, model().eval(), other.state_dict(), str(run.path), sharded=False)
    assert (first[3], second[3], expected[3]) == (2, 3, 5)
    assert first[:3] == second[:3] == expected[:3]
    assert expected[0]["weights"] == expected[1]["weights"] != expected[0]["ema"]
    best = (f"{kind}-best/{name}.safetensors" for name in ("model", "ema"))
    for name in ("images/test-00000002.png", *best):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.integers(2, 8), st.integers(2, 8), st.integers(0, 1000))
def test_frechet_distance_is_its_formula(images, others, width, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, width, dtype=torch.float64, generator=generator) for count in (images, others))
    values = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * values.sqrt().sum()
    assert frechet_distance_of_rows(a, b) == pytest.approx(float(expected), abs=1e-5)
    assert frechet_distance_of_rows(a, a) == pytest.approx(0, abs=1e-9)


def test_one_image_has_no_distance():
    with pytest.raises(UserError, match=r"^a Frechet distance needs at least 2 images, got 1$"):
        frechet_distance_of_rows(torch.zeros(1, 3), torch.zeros(1, 3))
