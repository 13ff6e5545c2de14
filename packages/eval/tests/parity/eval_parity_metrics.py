"""Runs the cases of the metrics of images, features and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.eval.distances import centre_of, moved, radii
from smalti.eval.frechet import frechet_distance, statistics_of
from smalti.eval.inception_score import adm_inception_score, inception_score
from smalti.eval.pairwise import pooled_psnr, psnr, ssim, ssim_reflected, ssim_uniform
from smalti.eval.precision_recall import precision_recall

Case = dict[str, Any]
Stages = Mapping[str, Tensor]
# What the cases say in words.
MIXTURES = (0.02, 0.1, 0.3, 0.6, 1.2)
CODES = 1024
NOISE = 0.15


def _truncated(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8, rounded down."""
    return (255 * ((images + 1) / 2).clamp(0, 1)).floor().to(torch.uint8)


def _values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def adm(case: Case, parity: ModuleType) -> Stages:
    assert case["config"] in ({}, {"family": "metrics"}), case["config"]
    inputs = parity.fill_case_inputs(case)
    references, samples = inputs["reference"], 0.9 * inputs["samples"] + 0.15
    logits = 2 * inputs["logits"]
    shares = precision_recall(samples, references, 3)
    metrics = _values(
        frechet_distance(statistics_of(references), statistics_of(samples)),
        shares.precision,
        shares.recall,
        inception_score(logits, splits=1, seed=None).mean,
        adm_inception_score(logits, split_size=400).mean,
    )
    return {"metrics": metrics, "radii": radii(moved(references, centre_of(references)), 3)[:, None]}


def gaussiantoken(case: Case, parity: ModuleType) -> Stages:
    assert not case["config"], case["config"]
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"]
    shares = torch.tensor(MIXTURES)[:, None, None, None]
    copies = image + shares * (inputs["noise"] - image)
    pair = _truncated(copies), _truncated(image)
    clamped = copies.clamp(-1, 1), image.clamp(-1, 1)
    other = 1.3 * inputs["features_b"].double() + 0.2
    other[:, 0] += other[:, 1]
    first, second = statistics_of(inputs["features_a"].double()), statistics_of(other)
    shift = (first.mean - second.mean).square().sum()
    return {
        "ssim": ssim_uniform(*pair),
        "psnr": torch.cat([pooled_psnr(*pair)[None], psnr(*pair)]),
        "frechet": _values(frechet_distance(first, second), float(shift), float(second.covariance.trace())),
        "validation": torch.stack([ssim_reflected(*clamped).mean(), pooled_psnr(*clamped)]),
    }


def vistok(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    queue = config.pop("queue")
    assert not config, config
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"]
    distorted = (image + NOISE * inputs["noise"]).clamp(-1, 1)
    pair = distorted, image
    truncated = _truncated(distorted), _truncated(image)
    noise_floor = (10 ** (-psnr(*pair) / 10) + 1e-8).log10() * -10  # piqa adds it to the error
    per_image = {
        "psnr": psnr(*pair),
        "ssim": ssim_uniform(*pair),
        "psnr_piqa": noise_floor,
        "ssim_piqa": ssim(*pair),
        "psnr_uint8": psnr(*truncated),
        "ssim_uint8": ssim_uniform(*truncated),
    }
    stages = {name: torch.cat([values, _values(0)]) for name, values in per_image.items()}
    for name, latest in (("all", None), ("queue", queue)):
        health = CodebookHealth((CODES,), latest)
        health.update(inputs["tokens"].reshape(1, -1, 1))
        figures = health.result()
        stages |= {f"{figure}_{name}": _values(figures[figure][0], 0) for figure in ("usage", "perplexity")}
    return stages | {"reference": (image + 1) / 2, "distorted": (distorted + 1) / 2}


RUNNERS = {"fqgan-adm-metrics": adm, "gaussiantoken-metrics": gaussiantoken, "vistok-metrics": vistok}
