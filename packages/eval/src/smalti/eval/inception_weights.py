"""Where the weights of FID's Inception lie: a path, torch's cache, or fetched into it."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.errors import UserError

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256_START = "6726825d"  # of the file that torch-fidelity and pytorch-fid publish, each under its own name
NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")


def inception_weights(path: Path | None = None) -> Path:
    """The file with the weights; without `path`, the one in torch's cache, which is fetched where it is missing.

    Raises:
        UserError: it is not there and cannot be fetched; says where to get it and where to put it.
    """
    if path is not None:
        if not path.is_file():
            raise UserError(f"the Inception weights {path} do not exist: download {URL} and give the path of that file")
        return path
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in NAMES:
        if (cache / name).is_file():
            return cache / name
    target = cache / NAMES[0]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL, str(target), hash_prefix=SHA256_START, progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the Inception weights are missing and could not be fetched ({getattr(error, 'reason', error)}): "
            f"download {URL} and put it at {target}, or give its path as extractor.weights=FILE"
        ) from None
    return target


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def published_network(path: Path) -> Any:
    """torch-fidelity's network with the weights of a file, in evaluation mode.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import (  # type: ignore[import-untyped]
        FeatureExtractorInceptionV3,
    )

    # torch-fidelity would run what a pickle says, so it gets a file of ours that holds nothing but the tensors.
    tensors = read_checkpoint(path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "weights.pth"
            torch.save(tensors, plain)
            return FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(plain)
            )
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold torch-fidelity's Inception weights: {problem}") from None
