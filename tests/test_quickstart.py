"""The quickstart in small: every stage, the files that it promises, and what a person is told."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow


def test_summary_and_report(finished):
    summary = json.loads((finished / "summary.json").read_text())
    names = ("psnr", "codebook_usage", "classified_as_intended", "classifier_accuracy", "frechet_distance", "seconds")
    assert all(np.isfinite(summary[name]) for name in names)
    assert 5 < summary["psnr"] < 50
    assert 0 < summary["codebook_usage"] <= 1
    assert summary["frechet_distance"] > 0
    report = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", report), "the report must need no other file"
    for part in ("Trouser", "Ankle boot", "PSNR", "Fréchet distance", "codebook_size: 32"):
        assert part in report, part


def test_samples(finished):
    samples = np.load(finished / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (200, 32, 32, 3)
    assert samples["arr_1"].tolist() == list(range(10)) * 20
    with Image.open(finished / "samples" / "grid.png") as grid:
        assert grid.size == (10 * 66 - 2, 10 * 66 - 2)


def test_the_same_seed_gives_the_same_files(finished, smalti, shrunk, files):
    """Also: a finished run is told where its results are, and is not run again."""
    stdout, stderr = smalti("quickstart", *shrunk, "--out", "again")
    assert files(smalti.folder / "again") == files(finished)
    assert "psnr" in stdout
    assert "again/report.html" in stdout
    assert re.search(r"train-generator: 60/60, [\d.]+ step/s, 0 s left, cross_entropy [\d.]+", stderr)
    stdout, stderr = smalti("quickstart", *shrunk, "--out", "again")
    assert stderr.count("done before") == 5


def test_a_quickstart_without_figures_tells_what_there_is(finished, smalti, shrunk):
    shutil.copytree(finished, smalti.folder / "run")
    for name in ("summary.json", "report.html"):
        (smalti.folder / "run" / name).unlink()
    stdout, _ = smalti("quickstart", *shrunk, "evaluate=null", "--out", "run", "--force")
    assert stdout == "samples: run/samples/grid.png\n"


def test_each_command_tells_where_its_results_are(finished, smalti):
    shutil.copytree(finished, smalti.folder / "run")
    told = {command: smalti(*command.split(), "run")[0] for command in ("run", "tokenize", "sample", "evaluate")}
    figures, report, samples = "psnr ", "report:  run/report.html\n", "samples: run/samples/grid.png\n"
    assert told["run"].startswith(figures)
    assert told["run"].endswith(samples + report)
    assert told["evaluate"].startswith(figures)
    assert told["evaluate"].endswith(report)
    assert samples not in told["evaluate"]
    assert (told["tokenize"], told["sample"]) == ("", samples)
