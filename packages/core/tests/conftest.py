import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from smalti.core.plugins import registry

TOY = Path(__file__).parent / "toy"


@pytest.fixture(autouse=True)
def toy_plugin(monkeypatch):
    """The registry sees the toy plugin, and no plugin of a sibling."""
    monkeypatch.syspath_prepend(TOY)
    monkeypatch.setenv("SMALTI_PLUGINS", "core,toy")
    registry.cache_clear()
    yield
    registry.cache_clear()


@pytest.fixture
def smalti(tmp_path):
    """Run the command line in `tmp_path`: arguments to the finished process."""

    def run(*arguments, check=False, **environment):
        command = [sys.executable, "-m", "smalti", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(TOY), "SMALTI_PLUGINS": "core,toy", **environment}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_png():
    return png


@pytest.fixture(scope="session")
def make_tar():
    return tar_of


@pytest.fixture
def images(tmp_path) -> Path:
    """A tar of 24 grey images of 3 classes, 8 x 8: each class a brightness."""
    random = np.random.default_rng(0)
    members = {}
    for index in range(24):
        label = index % 3
        pixels = np.clip(80 * label + random.integers(0, 60, (8, 8)), 0, 255).astype(np.uint8)
        members[f"{index:04d}.png"] = png(pixels)
        members[f"{index:04d}.cls"] = str(label).encode()
    path = tmp_path / "images.tar"
    path.write_bytes(tar_of(members))
    return path


@pytest.fixture
def content(images) -> dict:
    """A recipe of seconds, as plain data."""
    dataset = {"name": "webdataset", "shards": str(images), "classes": 3}
    training = {"steps": 8, "batch_size": 8, "learning_rate": 0.003, "log_every": 2, "checkpoint_every": 3}
    return {
        "name": "toy",
        "summary": "for tests",
        "data": {"train": dataset, "validation": dataset},
        "tokenizer": {
            "name": "composed",
            "preprocessing": {"image_size": 8, "channels": 1, "fit": "pad"},
            "encoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
            "quantizer": {"name": "signs", "dim": 4},
            "decoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
        },
        "generator": {"name": "table"},
        "train": {"tokenizer": {**training, "losses": [{"name": "l2"}]}, "generator": training},
        "tokenize": {"batch_size": 4, "shard_size": 10, "flip": True},
        "sample": {"count": 12, "batch_size": 4, "grid_columns": 2},
        "evaluate": {},
    }


@pytest.fixture
def recipe(tmp_path, content) -> Path:
    """The recipe as a file."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
