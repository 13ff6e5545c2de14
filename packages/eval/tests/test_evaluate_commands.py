"""`smalti evaluate images`, `tokens`, `stats` and `compare` as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PLUGIN = Path(__file__).parent / "plugin"
SMALL = ("--protocol", "dinov2", "extractor.name=small-network")


@pytest.fixture
def smalti(tmp_path):
    """Run the command line in `tmp_path`."""

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "smalti", "evaluate", *map(str, arguments)]
        settings = {"PYTHONPATH": str(PLUGIN), "SMALTI_PLUGINS": "core,eval,eval-toy", "OMP_NUM_THREADS": "1"}
        env = {**os.environ, **settings, **environment}
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300)

    return run


@pytest.fixture
def archives(tmp_path):
    for seed, name in enumerate(("a", "b")):
        images = np.random.default_rng(seed).integers(0, 256, (20, 12, 12, 3)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)


@pytest.mark.slow
def test_from_two_sets_of_images_to_a_comparison(smalti, archives, tmp_path):
    done = smalti("images", "a.npz", "b.npz", *SMALL, "--metrics", "fd,psnr", "--out", "one")
    assert done.returncode == 0, done.stderr
    assert "warning: 20 images are fewer than 10000" in done.stderr
    content = json.loads((tmp_path / "one" / "results.json").read_text())
    figure = content["figures"]["fd"]
    assert done.stdout.splitlines()[0] == f"{'Fréchet distance':20} {figure['value']:.6g}"
    assert done.stdout.splitlines()[-1] == "report: one/report.html"
    assert content["protocol"]["name"] == "dinov2 with extractor.name=small-network"

    made = smalti("stats", "b.npz", *SMALL)
    assert made.returncode == 0, made.stderr
    statistics = made.stdout.removeprefix("statistics: ").strip()
    again = smalti("images", "a.npz", statistics, *SMALL, "--metrics", "fd", "--out", "two")
    assert again.stdout.splitlines()[0] == done.stdout.splitlines()[0]

    compared = smalti("compare", "one/results.json", "one/results.json")
    assert compared.returncode == 0, compared.stderr
    assert compared.stdout.splitlines()[1].split()[-4:] == ["+0", "lower", "is", "better"]
    assert smalti("--compare", "one/results.json", "one/results.json").stdout == compared.stdout
    refused = smalti("compare", "one/results.json", "two/results.json")
    assert refused.returncode == 2
    assert "are not comparable: reference.kind is 'images' and 'statistics'" in refused.stderr


def test_missing_weights_are_told_before_anything_else(smalti, tmp_path):
    done = smalti("images", "a.npz", "b.npz", "extractor.weights=none.pth")
    assert done.returncode == 2
    assert done.stderr.startswith("smalti: the Inception weights none.pth do not exist: download https://")
    assert len(done.stderr.splitlines()) == 1


def test_help_needs_no_torch(smalti, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    for command in ((), ("images",), ("tokens",), ("stats",), ("compare",)):
        done = smalti(*command, "--help", PYTHONPATH=f"{tmp_path}:{PLUGIN}")
        assert done.returncode == 0, done.stderr
        assert "Usage: " in done.stdout
