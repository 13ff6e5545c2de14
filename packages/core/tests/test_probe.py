import json

import pytest
import torch

from smalti.core import probe as module
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.probe import Latents, ProbeSettings, accuracy, fit, probe
from smalti.core.progress import Reporter
from smalti.core.recipe import DataSection

SETTINGS = ProbeSettings(epochs=20, batch_size=8, learning_rate=0.05)


@pytest.fixture
def tokenizer(content):
    torch.manual_seed(0)
    return registry().options("tokenizer", "composed").model_validate(content["tokenizer"]).build().eval()


@pytest.fixture
def data(content):
    return DataSection.model_validate(content["data"])


def run(tokenizer, data, folder, **changes):
    folder.mkdir(exist_ok=True)
    return probe(tokenizer, data, folder, SETTINGS.model_copy(update=changes), Reporter(quiet=True))


def test_brightness_is_found_in_latents(tokenizer, data, tmp_path, monkeypatch):
    """Of random weights: the three classes of the tests' images differ in brightness."""
    result = run(tokenizer, data, tmp_path / "a")
    assert result == json.loads((tmp_path / "a" / "probe.json").read_text())
    assert result["top1"] > 0.9
    assert result["top5"] == 1.0
    assert (result["classes"], result["images"], result["latent_width"]) == (3, {"train": 24, "validation": 24}, 4)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert run(tokenizer, data, tmp_path / "b") == result
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == files
    # Latents are computed once for a tokenizer and its images, whatever the settings.
    monkeypatch.setattr(module, "_computed", lambda *_: pytest.fail("computed again"))
    assert run(tokenizer, data, tmp_path / "a", seed=1)["settings"]["seed"] == 1
    with torch.no_grad():
        tokenizer.to_codes.bias.add_(1)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        run(tokenizer, data, tmp_path / "a")


def test_latents_are_what_the_quantizer_gets(tokenizer, data, tmp_path):
    run(tokenizer, data, tmp_path / "a")
    from safetensors.torch import load_file

    from smalti.core.data.loader import read_images

    (batch,) = read_images(data.validation.build(), tokenizer.preprocessing, 24, max_undecodable=0, warn=print)
    found = load_file(tmp_path / "a" / "features-validation.safetensors")
    assert torch.equal(found["labels"], batch.labels)
    with torch.no_grad():
        for view, images in enumerate((batch.images, batch.images.flip(-1))):
            expected = tokenizer.to_codes(tokenizer.encoder(images)).mean((1, 2))
            torch.testing.assert_close(found["latents"][:, view], expected)


def test_accuracy_by_hand():
    """Seven classes; the label comes first, fifth, sixth, first."""
    logits = torch.arange(7.0, 0.0, -1.0).expand(4, 7)
    data = Latents(logits[:, None], torch.tensor([0, 4, 5, 0]))
    assert accuracy(torch.nn.Identity(), data) == (0.5, 0.75)


def test_fit_is_seeded():
    data = Latents(torch.randn(9, 2, 3), torch.arange(9) % 2)
    first, second, other = (fit(data, 2, ProbeSettings(epochs=2, batch_size=4, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first[1].weight, second[1].weight)
    assert not torch.equal(first[1].weight, other[1].weight)


def test_a_tokenizer_without_quantizer(tokenizer, data, tmp_path):
    tokenizer.quantizer = torch.nn.Identity()
    with pytest.raises(UserError, match=r"^probe: ComposedTokenizer has no quantizer whose input could be probed$"):
        run(tokenizer, data, tmp_path / "a")


@pytest.mark.slow
def test_the_command(tokenizer, recipe, smalti, tmp_path):
    done = smalti("probe", recipe, "--out", "probed")
    assert done.returncode == 2
    assert done.stderr == f"smalti: probe: {recipe} is not a run folder with a tokenizer: give one with --tokenizer\n"
    tokenizer.save_pretrained(tmp_path / "saved")
    arguments = ("--epochs", 20, "--batch-size", 8, "--learning-rate", 0.05)
    done = smalti("probe", recipe, "--tokenizer", "saved", "--out", "probed", *arguments, check=True)
    assert done.stdout.startswith("top-1 ")
    assert done.stdout.endswith("%, top-5 100.00%\nresult: probed/probe.json\n")
