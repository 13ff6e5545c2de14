import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context

PLUGIN = Path(__file__).parent / "plugin"
SIDE = 16
CLASSES = ("bright left", "bright right", "<flat>")


@pytest.fixture(autouse=True)
def toy_plugin(monkeypatch):
    """The registry sees core, this package and the toy plugin, and no sibling."""
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.setenv("SMALTI_PLUGINS", "core,eval,eval-toy")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def figure_names():
    """What the evaluation of a run measures, in this order."""
    return [
        "psnr",
        "ssim",
        "codebook_usage",
        "codebook_perplexity",
        "classified_as_intended",
        "classifier_accuracy",
        "frechet_distance",
        "frechet_distance_real",
        "precision",
        "recall",
    ]


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Seeded weights under the names and shapes of torch-fidelity's file, of a size that keeps features alive."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(Network, "load_state_dict", lambda self, state: None)
        network = Network("seeded", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.7, 1.3)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def picture():
    """Grey uint8 `(H, W)` of a class that a small network tells from the others at once."""

    def draw(label, random):
        image = random.integers(0, 60, (SIDE, SIDE))
        if label < 2:
            image[:, label * SIDE // 2 : (label + 1) * SIDE // 2] += 150
        return image.astype(np.uint8)

    return draw


def write_tar(path, pictures):
    from smalti.core.data.images import png_bytes

    with tarfile.open(path, "w") as tar:
        for index, (image, label) in enumerate(pictures):
            for extension, content in (("png", png_bytes(image)), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{index:04d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def content(tmp_path, picture):
    """A recipe as plain data: 60 training and 30 validation images, a classifier of 30 steps."""
    random = np.random.default_rng(0)
    for name, count in (("train", 60), ("validation", 30)):
        write_tar(tmp_path / f"{name}.tar", [(picture(index % 3, random), index % 3) for index in range(count)])
    training = {"steps": 1, "batch_size": 1, "learning_rate": 0.001}
    return {
        "name": "toy & co",
        "summary": "for <tests>",
        "data": {
            name: {"name": "webdataset", "shards": str(tmp_path / f"{name}.tar"), "classes": CLASSES}
            for name in ("train", "validation")
        },
        "tokenizer": {"name": "tiles"},
        "generator": {"name": "uniform"},
        "train": {"tokenizer": {**training, "losses": [{"name": "l2"}]}, "generator": training},
        "sample": {"count": 30},
        "evaluate": {
            "classifier": {
                "steps": 30,
                "batch_size": 10,
                "width": 4,
                "warmup_steps": 2,
                "flip": False,
                "log_every": 10,
                "checkpoint_every": 10,
                "learning_rate": 0.02,
            },
            "batch_size": 8,
            "shown_reconstructions": 4,
            "shown_samples": 3,
        },
    }


@pytest.fixture
def samples(picture):
    """Thirty `samples`, uint8 `(30, 16, 16, 3)`, with labels; the first three of class 0 look like class 1."""
    random = np.random.default_rng(1)
    labels = np.arange(30, dtype=np.int64) % 3
    looks = [1 if index in (0, 3, 6) else label for index, label in enumerate(labels)]
    images = np.stack([picture(label, random) for label in looks])
    return images[..., None].repeat(3, axis=3), labels


@pytest.fixture
def prepared(tmp_path, content, samples):
    """Makes a context whose run folder is ready to be evaluated: name of the folder to context."""

    def prepare(name="run", images=samples[0], labels=samples[1], **overrides):
        recipe = Recipe.model_validate({**content, **overrides})
        run = RunFolder(tmp_path / name)
        run.prepare(recipe)
        recipe.tokenizer.build().save_pretrained(run / "tokenizer")
        (run / "samples").mkdir()
        np.savez(run / "samples" / "samples.npz", images, labels)
        run.record("train-tokenizer", fingerprint="f", done=True, seconds=100.0)
        run.record("sample", fingerprint="f", done=True, seconds=20.5)
        for step in range(2, 11, 2):
            run.append_metrics({"stage": "train-tokenizer", "step": step, "learning_rate": 0.1, "l2": 0.5 / step})
        return Context(run, recipe, "cpu", Reporter(quiet=True))

    return prepare
