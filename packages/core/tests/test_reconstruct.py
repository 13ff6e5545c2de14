"""`smalti reconstruct`: pictures, tokens and metrics of images in files, folders and shards."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.commands import models
from smalti.core.data.images import GAP
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.plugins import registry
from smalti.core.recipe import Recipe
from smalti.core.reconstruct import image_size, reconstruct_images


@pytest.fixture
def tokenizer(content):
    torch.manual_seed(0)
    content["tokenizer"]["preprocessing"] = {"image_size": 16, "channels": 3, "fit": "center-crop"}
    return Recipe.model_validate(content).tokenizer.build().eval()


@pytest.fixture
def saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def pictures(tmp_path):
    """Three images of different sizes in a folder, and a file that is none."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for name, (height, width) in {"a.png": (16, 16), "b.JPG": (20, 16), "deeper/c.webp": (16, 32)}.items():
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._a.png").write_text("what some file managers leave")
    return folder


def reconstruct(tokenizer, inputs, out, *arguments):
    out.mkdir()
    return reconstruct_images(tokenizer, [str(source) for source in inputs], out, *arguments)


def picture(path):
    with Image.open(path) as file:
        return np.asarray(file).copy()


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_pictures_tokens_and_metrics(smalti, saved, tokenizer, pictures, tmp_path):
    done = smalti("reconstruct", "pictures", "--tokenizer", "tokenizer", "--out", "out", "--batch-size", 2, check=True)
    out = tmp_path / "out"
    names = ["0000-a", "0001-b", "0002-c"]
    expected = sorted(["grid.png", "metrics.json", *(f"{name}.{kind}" for name in names for kind in ("png", "npz"))])
    assert sorted(path.name for path in out.iterdir()) == expected
    assert done.stdout.startswith("3 images, difference ")

    found = metrics(out)
    assert [entry["file"] for entry in found["by_image"]] == [f"{name}.png" for name in names]
    assert found["means"]["difference"] == pytest.approx(np.mean([entry["difference"] for entry in found["by_image"]]))
    assert found["definitions"] == {"difference": "mean absolute difference; unit: levels"}

    pixels = torch.from_numpy(picture(pictures / "a.png")).movedim(-1, 0)[None]
    tokens = tokenizer.encode(pixels.float() / 127.5 - 1)
    stored = np.load(out / "0000-a.npz")
    assert np.array_equal(stored["tokens"], tokens[0].numpy())
    layout = TokenLayout.model_validate_json(str(stored["layout"]))
    assert layout == tokenizer.layout()

    strip = picture(out / "0000-a.png")
    scale = 128 // 16
    original, copy = strip[:, : 16 * scale], strip[:, 16 * scale + GAP :]
    assert np.array_equal(original[::scale, ::scale], pixels[0].movedim(0, -1).numpy())
    images = tokenizer.decode(torch.from_numpy(stored["tokens"])[None], layout)
    difference = copy[::scale, ::scale].astype(int) - ((images[0] + 1) * 127.5).round().movedim(0, -1).numpy()
    assert np.abs(difference).max() <= 1


def test_a_drawing_of_the_tokens_is_the_third_picture(tokenizer, pictures, tmp_path, monkeypatch):
    def draw(tokens, layout, size):
        assert tokens.shape[1] == layout.positions
        return torch.full((len(tokens), 3, *size), 7, dtype=torch.uint8)

    monkeypatch.setattr(type(tokenizer), "drawings", {"sevens": draw})
    out = tmp_path / "out"
    reconstruct(tokenizer, [pictures], out, None, 8, "sevens")
    strip = picture(out / "0000-a.png")
    assert strip.shape == (128, 3 * 128 + 2 * GAP, 3)
    assert (strip[:, -128:] == 7).all()
    assert picture(out / "grid.png").shape == (128, 9 * 128 + 8 * GAP, 3)
    plain = tmp_path / "plain"
    reconstruct(tokenizer, [pictures], plain)
    assert np.array_equal(picture(plain / "0000-a.png"), strip[:, : -128 - GAP])


def test_a_drawing_that_it_does_not_have(tokenizer, pictures, tmp_path):
    with pytest.raises(UserError) as caught:
        reconstruct(tokenizer, [pictures], tmp_path / "out", None, 8, "gaussians")
    assert str(caught.value) == "ComposedTokenizer has no drawing 'gaussians' of its tokens; it has: none"


def test_batches_do_not_matter(tokenizer, pictures, tmp_path):
    for size in (1, 3):
        reconstruct(tokenizer, [pictures], tmp_path / f"by{size}", None, size)
    for path in (tmp_path / "by1").glob("*.npz"):
        assert np.array_equal(np.load(path)["tokens"], np.load(tmp_path / "by3" / path.name)["tokens"])


def test_shards(content, images, tmp_path):
    tokenizer = Recipe.model_validate(content).tokenizer.build().eval()
    summary = reconstruct(tokenizer, [images], tmp_path / "out")
    assert summary.images == 24
    assert metrics(tmp_path / "out")["by_image"][23]["image"] == f"{images}/0023"
    assert picture(tmp_path / "out" / "grid.png").shape[2] == 3


def test_another_size(tokenizer, pictures, tmp_path):
    reconstruct(tokenizer, [pictures / "a.png"], tmp_path / "out", 32)
    (entry,) = metrics(tmp_path / "out")["by_image"]
    assert entry["size"] == [32, 32]
    layout = TokenLayout.model_validate_json(str(np.load(tmp_path / "out" / "0000-a.npz")["layout"]))
    assert layout == tokenizer.layout((32, 32))


def test_the_images_own_sizes(tokenizer, pictures, tmp_path):
    reconstruct(tokenizer, [pictures], tmp_path / "out", "original")
    assert [entry["size"] for entry in metrics(tmp_path / "out")["by_image"]] == [[16, 16], [20, 16], [16, 32]]
    assert picture(tmp_path / "out" / "0002-c.png").shape == (16 * 4, 2 * 32 * 4 + GAP, 3)


def test_a_size_that_the_architecture_cannot_take(tokenizer, pictures, tmp_path):
    Image.new("RGB", (18, 17)).save(pictures / "odd.png")
    with pytest.raises(UserError) as caught:
        reconstruct(tokenizer, [pictures / "odd.png"], tmp_path / "out", "original")
    assert str(caught.value).startswith(f"{pictures / 'odd.png'}, 17 x 18 pixels: ")


def test_what_is_no_image(saved, pictures, tmp_path, monkeypatch):
    def told(source):
        with pytest.raises(UserError) as caught:
            models.reconstruct([source], "tokenizer", tmp_path / "out")
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]
        return str(caught.value)

    monkeypatch.chdir(tmp_path)
    assert told("pictures/notes.txt").startswith("pictures/notes.txt: cannot identify image file")
    assert told("nowhere") == "nowhere does not exist: give image files, folders of them, or tar shards"
    (tmp_path / "empty").mkdir()
    assert told("empty") == "there is no image in empty"


def test_a_metric_that_cannot_take_small_images(tokenizer, pictures, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("too small")

    options = registry().options("metric", "difference")
    metric = options().build()
    monkeypatch.setattr(options, "build", lambda _: type(metric)(metric.unit, metric.definition, refuse))
    summary = reconstruct(tokenizer, [pictures], tmp_path / "out")
    assert summary.means == {}
    assert metrics(tmp_path / "out")["by_image"][0]["difference"] is None


def test_sizes_on_the_command_line():
    assert [image_size(text) for text in ("", "original", "64")] == [None, "original", 64]
    for text in ("0", "-3", "big", "1.5"):
        with pytest.raises(UserError) as caught:
            image_size(text)
        assert str(caught.value) == f"size must be a number of pixels or `original`, got {text!r}"
