"""`smalti fit`: what it writes, how it goes on, how it fails."""

import errno
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.progress import Reporter
from smalti.gaussian.fitting import folder as fit_folder
from smalti.gaussian.fitting.command import fit
from smalti.gaussian.fitting.fit import FitOptions
from smalti.gaussian.fitting.folder import FitFolder, Wanted
from smalti.gaussian.fitting.input import read_image
from smalti.gaussian.fitting.picture import GaussianPicture
from smalti.gaussian.fitting.quantized import Bits, load_quantized

OPTIONS = FitOptions(gaussians=30, steps=12)


@pytest.fixture
def image():
    y, x = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 32), indexing="ij")
    return torch.stack((x, y, (x * 9).sin().abs()))


def run(path, image, wanted=Wanted(), options=OPTIONS):  # noqa: B008
    return list(FitFolder(path, image, options, wanted, Reporter(quiet=True)).run())


def pixels(path):
    with Image.open(path) as file:
        return np.asarray(file).copy()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WHOLE = Wanted(scale=2, bits=Bits(), tuning_steps=3, gif=True)


def test_what_it_writes(image, tmp_path):
    lines = run(tmp_path, image, WHOLE)
    names = {"gaussians.safetensors", "rendering.png", "ellipses.png", "metrics.json", "fit.gif"}
    assert set(files(tmp_path)) == names | {"quantized.safetensors", "quantized.png"}

    found = json.loads((tmp_path / "metrics.json").read_text())
    size = (tmp_path / "quantized.safetensors").stat().st_size
    assert found["quantized"]["bytes"] == size
    assert found["quantized"]["bits_per_pixel"] == pytest.approx(8 * size / (24 * 32))
    assert lines[0].startswith(f"30 Gaussians, 32 x 24 x 3, 12 steps: PSNR {found['psnr']:.2f} dB, ")

    picture = GaussianPicture.load(tmp_path / "gaussians.safetensors")
    for name, source in (("rendering", picture), ("quantized", load_quantized(tmp_path / "quantized.safetensors"))):
        expected = (source.render(2).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(pixels(tmp_path / f"{name}.png") - expected).max() <= 1
    assert pixels(tmp_path / "ellipses.png").shape == (48, 64, 3)
    with Image.open(tmp_path / "fit.gif") as animation:
        assert (animation.size, animation.n_frames) == ((32, 24), len(fit_folder._frames(12)))


def test_an_interrupted_fit_goes_on_and_ends_with_the_same_files(image, tmp_path, monkeypatch):
    run(tmp_path / "whole", image, WHOLE)
    step = fit_folder.Fitting.steps

    def interrupted(fitting):
        for found in step(fitting):
            yield found
            if found.number == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(fit_folder.Fitting, "steps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", image, WHOLE)
    assert {"state.safetensors", "gaussians.safetensors", "rendering.png"} == set(files(tmp_path / "stopped"))
    monkeypatch.undo()
    run(tmp_path / "stopped", image, WHOLE)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_a_fit_killed_before_it_saved_goes_on(image, tmp_path, monkeypatch):
    run(tmp_path / "whole", image, WHOLE)
    step = fit_folder.Fitting.steps

    def killed(fitting):
        for found in step(fitting):
            yield found
            if found.number == 5:
                monkeypatch.setattr(fit_folder.FitFolder, "_save", lambda self: None)  # there is no time for it
                raise KeyboardInterrupt

    monkeypatch.setattr(fit_folder.Fitting, "steps", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", image, WHOLE)
    monkeypatch.undo()
    run(tmp_path / "killed", image, WHOLE)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_fit_killed_while_it_wrote_its_first_file_begins_again(image, tmp_path):
    (tmp_path / ".state.safetensors.part").write_bytes(b"{")
    run(tmp_path, image)
    assert "metrics.json" in files(tmp_path)


def test_a_fit_killed_after_its_animation_goes_on(image, tmp_path, monkeypatch):
    def killed(path, missing_ok=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", killed)  # of the state, the last thing but one
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, image, WHOLE)
    monkeypatch.undo()
    before = files(tmp_path)
    run(tmp_path, image, WHOLE)
    assert files(tmp_path) == {name: content for name, content in before.items() if name != "state.safetensors"}
    assert not (tmp_path / "frames").exists()


def test_a_finished_fit_is_drawn_again_without_fitting(image, tmp_path, monkeypatch):
    run(tmp_path, image)
    before = files(tmp_path)
    monkeypatch.setattr(fit_folder.FitFolder, "_fitted", None)
    run(tmp_path, image, Wanted(scale=3, bits=Bits(), tuning_steps=2))
    assert pixels(tmp_path / "rendering.png").shape == (72, 96, 3)
    assert files(tmp_path)["gaussians.safetensors"] == before["gaussians.safetensors"]
    assert "quantized.safetensors" in files(tmp_path)


def test_a_folder_with_something_else_is_left_alone(image, tmp_path):
    run(tmp_path / "fit", image)
    with pytest.raises(
        UserError, match=r"fit holds a fit with steps 12, not 13: give another folder, or remove it first"
    ):
        run(tmp_path / "fit", image, options=FitOptions(gaussians=30, steps=13))
    with pytest.raises(UserError, match=r"fit holds a fit with image \w+, not \w+: "):
        run(tmp_path / "fit", image.flip(1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("all of it")
    with pytest.raises(UserError, match=r"other is not empty and holds no fit: give another folder$"):
        run(tmp_path / "other", image)
    with pytest.raises(UserError, match=r"thesis.tex is a file: give a folder$"):
        run(tmp_path / "other" / "thesis.tex", image)
    with pytest.raises(
        UserError, match=r"scale 2000 makes more than 268 million pixels of 32 x 24: choose a smaller one"
    ):
        run(tmp_path / "large", image, Wanted(scale=2000))
    with pytest.raises(UserError, match=r"^scale 0.01 leaves nothing of a picture of 32 x 24 pixels$"):
        run(tmp_path / "large", image, Wanted(scale=0.01))
    assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 51, [0.2]),
        ("1", 1, [1.0]),
        ("I;16", 6554, [0.1]),
        ("RGB", (255, 0, 51), [1.0, 0.0, 0.2]),
        ("RGBA", (255, 0, 0, 51), [1.0, 0.8, 0.8]),
        ("LA", (0, 0), [1.0]),
        ("P", 0, [0.0, 0.0, 0.0]),
        ("CMYK", (0, 0, 0, 0), [1.0, 1.0, 1.0]),
    ],
)
def test_images_of_every_kind(tmp_path, mode, colour, expected):
    path = tmp_path / ("x.tif" if mode in ("I;16", "CMYK") else "x.png")
    Image.new(mode, (6, 4), colour).save(path)
    found = read_image(path)
    assert found.shape == (len(expected), 4, 6)
    assert found[:, 0, 0].tolist() == pytest.approx(expected, abs=1e-4)
    assert read_image(path, 12).shape == (len(expected), 8, 12)


def test_orientation_is_followed(tmp_path):
    picture = Image.new("RGB", (6, 4))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").shape == (3, 6, 4)


@pytest.mark.parametrize(
    ("name", "count", "sentence"),
    [
        ("none.png", 5, "none.png does not exist: give an image file"),
        (".", 5, ". is not a file"),
        ("notes.txt", 5, "notes.txt cannot be read as an image: cannot identify image file 'notes.txt'"),
        ("x.png", 25, "gaussians must be at most one per pixel, 24 for 6 x 4 pixels, got 25"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, name, count, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    Image.new("RGB", (6, 4)).save(tmp_path / "x.png")
    with pytest.raises(UserError) as caught:
        fit(Path(name), count, Path("out"), device="cpu")
    assert str(caught.value) == sentence
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(image, tmp_path, monkeypatch):
    def refused(*_arguments, **_settings):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "out", image)
    assert str(caught.value) == f"{tmp_path / 'out'} cannot be written: Permission denied"


def test_ctrl_c_is_told_and_the_same_command_ends_the_fit(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (20, 25), dtype=np.uint8)).save(tmp_path / "grey.png")
    out, step = tmp_path / "out", fit_folder.Fitting.steps
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test runners may ignore it

    def pressed(fitting):
        for found in step(fitting):
            yield found
            if found.number == 5:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fit_folder.Fitting, "steps", pressed)
    with pytest.raises(typer.Exit) as caught:
        fit(tmp_path / "grey.png", 20, out, steps=12, gif=True)
    signal.signal(signal.SIGINT, before)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err.endswith("smalti: interrupted; the same command goes on from here\n")
    assert (out / "state.safetensors").exists()

    monkeypatch.undo()
    fit(tmp_path / "grey.png", 20, out, steps=12, gif=True)
    said, told = capsys.readouterr()
    assert said.startswith("20 Gaussians, 25 x 20 x 1, 12 steps: PSNR ")
    assert told.startswith("fit: 12/12, ")
    assert not (out / "state.safetensors").exists()
