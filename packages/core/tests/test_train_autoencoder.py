"""Training of autoencoders, of text-aware ones, and of parts, through the stages of a recipe."""

import pytest
import torch

from smalti.core.autoencoder import Autoencoder
from smalti.core.errors import UserError
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.random_networks import TEXT_TOKENS, WIDTH, RandomNetworks
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.training import loop
from smalti.core.weights import read_tensors

SIZES = {"width": 16, "layers": 1, "heads": 1, "grid": [2, 2], "tokens": 3}
VALIDATION = {"every": 2, "images": 5, "pictures": 2, "best": {"metric": "difference", "prefer": "lower"}}
ADVERSARIAL = {"discriminator": {"name": "patchgan", "width": 8, "layers": 1}, "start": 1}


@pytest.fixture
def trained(content, tmp_path):
    """The run folder of the tests' recipe with an autoencoder in the place of its models."""

    def trained(name, decoder=None, **changes):
        training = content["train"]["tokenizer"] | {"steps": 4, "validation": VALIDATION, "checkpoint_every": 1}
        autoencoder = {
            "preprocessing": content["tokenizer"]["preprocessing"],
            "encoder": {"name": "titok", "patch": 4, **SIZES},
            "decoder": {"name": "titok", "head": {"name": "pixels", "patch": 4}, **SIZES, **(decoder or {})},
            "width": 4,
        }
        recipe = {
            **{key: content[key] for key in ("name", "summary", "data")},
            "autoencoder": {"name": "composed", **autoencoder},
            "train": {"autoencoder": {**training, "adversarial": ADVERSARIAL, **changes}},
        }
        recipe = Recipe.model_validate(recipe)
        run = RunFolder(tmp_path / name)
        with run.locked():
            run.prepare(recipe)
            Pipeline(Context(run, recipe, "cpu", Reporter(quiet=True))).run()
        return run

    return trained


def killed(monkeypatch, trained, name, **options):
    """A run that is killed before its fourth update."""
    update = loop._Loop._update

    def dying(self):
        if self.step == 3:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KeyboardInterrupt):
            trained(name, **options)


def test_an_autoencoder_trains_and_goes_on(trained, monkeypatch):
    whole = trained("whole")
    lines = whole.metrics("train-autoencoder")
    assert {"divergence", "adversarial", "discriminator"} <= lines[-1].keys()
    assert "codebook_health" not in lines[-1]
    assert isinstance(Autoencoder.from_pretrained(whole / "autoencoder"), Autoencoder)
    assert (whole / "autoencoder-best" / "best.json").exists()
    killed(monkeypatch, trained, "parts")
    parts = trained("parts")
    assert parts.metrics("train-autoencoder") == lines
    for folder in ("autoencoder", "autoencoder-best", "images"):
        for file in (whole / folder).iterdir():
            assert (parts / folder / file.name).read_bytes() == file.read_bytes()


def test_a_text_is_read_in_training_and_validation(trained, tmp_path):
    pytest.importorskip("transformers")
    encoder = RandomNetworks(tmp_path / "random", lambda sentence: None).text_encoder()
    decoder = {"name": "text-titok", "text_tokens": TEXT_TOKENS, "text_width": WIDTH}
    text = {"encoder": encoder, "of_class": "a {}."}
    runs = [trained(name, decoder, text=text | changes) for name, changes in (("one", {}), ("two", {"of_class": "b"}))]
    weights = [read_tensors(run / "autoencoder" / "model.safetensors")["decoder.from_text.weight"] for run in runs]
    assert not torch.equal(*weights)
    assert "validation" in runs[0].metrics("train-autoencoder")[-1]
    with pytest.raises(UserError, match=r" has no text: give the data set's option text, or text.of_class, "):
        trained("three", decoder, text={"encoder": encoder})
    with pytest.raises(UserError, match=r"^a text-aware decoder needs text features .* got none$"):
        trained("four", decoder)


def test_frozen_parts_stay_as_they_began_and_are_resumed(trained, monkeypatch):
    first = trained("first", steps=1)
    options = {
        "start": [{"source": str(first.path), "part": "encoder", "into": "encoder"}],
        "freeze": ["encoder", "to_moments"],
    }
    whole = trained("whole", **options)
    killed(monkeypatch, trained, "parts", **options)
    parts = trained("parts", **options)
    begun = read_tensors(first / "autoencoder" / "ema.safetensors")
    for name in ("model", "ema"):
        found, again = (read_tensors(run / "autoencoder" / f"{name}.safetensors") for run in (whole, parts))
        assert all(torch.equal(tensor, again[key]) for key, tensor in found.items())
        assert all(torch.equal(tensor, begun[key]) for key, tensor in found.items() if key.startswith("encoder."))
        assert not torch.equal(found["from_latent.weight"], begun["from_latent.weight"])


def test_what_an_autoencoder_does_not_have(trained):
    with pytest.raises(
        UserError, match=r"^train.autoencoder.freeze: the recipe's autoencoder has no part 'quantizer', "
    ):
        trained("one", freeze=["quantizer"])
    with pytest.raises(UserError, match=r"^perturbation needs tokens, which an autoencoder does not have$"):
        trained("two", perturbation={})
    with pytest.raises(UserError, match=r"^the autoencoder 'composed' has no quantizer with a latent to compare$"):
        trained("three", losses=[{"name": "dependency", "branches": 2}])


def test_a_recipe_has_one_of_both(content):
    with pytest.raises(ValueError, match="a recipe needs a tokenizer or an autoencoder: give one of them"):
        Recipe.model_validate({key: content[key] for key in ("name", "summary", "data", "train")})
    with pytest.raises(ValueError, match=r"autoencoder and train.autoencoder belong together: give both or neither"):
        Recipe.model_validate({**content, "train": {**content["train"], "autoencoder": content["train"]["tokenizer"]}})
