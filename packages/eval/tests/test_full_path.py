"""From image files to FID, Inception Score, precision and recall: torch-fidelity's whole path beside ours."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from smalti.core.progress import Reporter
from smalti.eval.evaluation_sides import Asked
from smalti.eval.frechet import frechet_distance_of_rows
from smalti.eval.image_evaluation import evaluate_images
from smalti.eval.inception_weights import published_network
from smalti.eval.protocols import protocol


def images_of(folder):
    paths = sorted(Path(folder).iterdir())
    return torch.from_numpy(np.stack([np.array(Image.open(path)) for path in paths])).movedim(-1, 1)


@pytest.mark.slow
def test_folders_of_images_get_the_figures_of_torch_fidelity(inception_file, tmp_path):
    folders = []
    for seed, name in enumerate(("images", "references")):
        random = np.random.default_rng(seed)
        (tmp_path / name).mkdir()
        for index in range(10):
            coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3)).astype(np.uint8))
            coarse.resize((40, 48), Image.Resampling.BICUBIC).save(tmp_path / name / f"{index}.png")
        folders.append(str(tmp_path / name))
    expected = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        fid=True,
        isc=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        batch_size=5,
        save_cpu_ram=True,  # no reading processes
        cuda=False,
        cache=False,
        verbose=False,
    )
    settings = protocol("torch-fidelity", [f"extractor.weights={inception_file}"])
    found = evaluate_images(Asked(*folders, settings, ("fid", "is", "precision-recall")), Reporter(quiet=True))
    figures = {figure.name: figure.value for figure in found.figures}
    # With fewer images than dimensions, torch-fidelity adds up roots of eigenvalues that are zero but for rounding.
    assert figures["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=3e-5)
    network = published_network(inception_file)
    with torch.inference_mode():
        theirs = [network(images_of(folder))[0] for folder in folders]
    assert figures["fid"] == pytest.approx(frechet_distance_of_rows(*theirs), rel=2e-6)
    assert figures["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    assert (figures["precision"], figures["recall"]) == (expected["precision"], expected["recall"])
