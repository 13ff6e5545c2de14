"""The recipe `gaussians` in small: Gaussians of a class are generated, decoded and drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.commands.models import reconstruct
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.stage import Context

COUNT, BITS = 12, 6
SMALL = (
    "tokenizer.encoder.widths=[8, 16]",
    "tokenizer.decoder.widths=[8, 16]",
    "tokenizer.quantizer.dim=16",
    "tokenizer.quantizer.codebook_size=32",
    f"tokenizer.embed.gaussians={COUNT}",
    "tokenizer.embed.width=32",
    "train.tokenizer.steps=12",
    "train.tokenizer.batch_size=16",
    "train.tokenizer.log_every=1",
    "generator.layers=1",
    "generator.dim=32",
    "generator.heads=2",
    "train.generator.steps=6",
    "train.generator.batch_size=16",
    "train.generator.log_every=1",
    "data.train.shards=embedded:fashion-mnist/validation-*.tar.gz",
    "sample.count=20",
    "sample.batch_size=20",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of every stage but the evaluation."""
    recipe = load_recipe("gaussians", SMALL)
    folder = RunFolder(tmp_path_factory.mktemp("gaussians") / "run")
    with folder.locked():
        folder.prepare(recipe)
        stages = ["train-tokenizer", "tokenize", "train-generator", "sample"]
        Pipeline(Context(folder, recipe, "cpu", Reporter(quiet=True))).run(stages)
    return folder


@pytest.fixture(scope="module")
def models(run):
    return Tokenizer.from_pretrained(run / "tokenizer"), Generator.from_pretrained(run / "generator")


def test_training_lowers_the_losses_of_codes_and_of_geometry(run):
    first, *_, last = run.metrics("train-tokenizer")
    assert last["l2"] < first["l2"]
    assert len(last["codebook_health"]["usage"]) == 1, "geometry has no codebook that could collapse"
    first, *_, last = run.metrics("train-generator")
    streams = [f"cross_entropy_{stream}" for stream in range(6)]
    # Untrained outputs are zero: every value of a stream is as likely as any other.
    assert [first[stream] for stream in streams] == pytest.approx(np.log([32, *[2**BITS] * 5]) / 6, rel=1e-3)
    assert all(last[stream] < first[stream] for stream in streams)


def test_generated_tokens_are_gaussians_of_the_tokenizer(models):
    tokenizer, generator = models
    labels = torch.arange(10)
    tokens = generator.sample(labels, SamplingSettings(guidance_scale=1.5, seed=3))
    assert tokens.shape == (10, COUNT, 6)
    assert generator.token_layout == tokenizer.layout()
    assert (tokens >= 0).all()
    assert (tokens < torch.tensor(generator.token_layout.vocab)).all()
    assert torch.equal(tokens, generator.sample(labels, SamplingSettings(guidance_scale=1.5, seed=3)))

    gaussians = tokenizer.gaussians(tokens)
    lowest, limit = tokenizer.options.embed.scales[0], tokenizer.embed.limit.bound
    assert (gaussians.means.abs() < 1).all()
    assert ((gaussians.scales > lowest) & (gaussians.scales < limit)).all()
    assert ((gaussians.rotations > 0) & (gaussians.rotations < np.pi)).all()
    images = tokenizer.decode(tokens, generator.token_layout)
    assert images.shape == (10, 1, 32, 32)
    assert images.isfinite().all()
    assert torch.equal(images, tokenizer.decoder(tokenizer.drawn(gaussians)).clamp(-1, 1))


def test_samples_of_the_run(run):
    samples = np.load(run / "samples" / "samples.npz")
    assert samples["arr_0"].shape == (20, 32, 32, 3)
    assert samples["arr_0"].std() > 0
    assert samples["arr_1"].tolist() == list(range(10)) * 2


def test_reconstruct_draws_the_gaussians_of_a_trained_tokenizer(run, tmp_path):
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    pictures = [str(tmp_path / "one.png"), str(tmp_path / "two.png")]
    reconstruct(pictures, tokenizer=str(run / "tokenizer"), out=out, draw="gaussians")
    assert json.loads((out / "metrics.json").read_text())["images"] == 2
    with Image.open(out / "0000-one.png") as strip:
        pixels = np.asarray(strip.convert("RGB")).astype(int)
    side = pixels.shape[1] // 3
    original, ellipses = pixels[:, :side], pixels[:, -side:]
    assert (ellipses == 255).all(-1).mean() > 0.3, "ellipses are drawn on white"
    assert (ellipses < 230).any(-1).sum() > COUNT
    assert (ellipses != original).any()
