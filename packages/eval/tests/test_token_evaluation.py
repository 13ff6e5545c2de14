"""The tokens of a tokenizer and of shards to figures of codes."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.data.token_shards import TokenManifest, shard_name, write_manifest, write_token_shard
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.testing.processes import run_in_processes
from smalti.eval.comparison import compared
from smalti.eval.image_report import write_evaluation
from smalti.eval.token_evaluation import AskedOfTokens, evaluate_tokens
from smalti.eval.tokens import TokenStatistics

SCALES = TokenLayout.scales(((1, 1), (2, 2)), (4, 16))
QUIET = Reporter(quiet=True)


@pytest.fixture
def shards(tmp_path):
    """Thirty images in two views, with two streams at two scales."""
    folder = tmp_path / "run" / "tokens"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tokens = np.stack([random.integers(0, size // 2, (30, 2, 5)) for size in SCALES.vocab], axis=-1)
    entry = write_token_shard(folder / shard_name(0), [f"{i:02d}" for i in range(30)], tokens, [0] * 30, SCALES)
    told = {"classes": ("a",), "tokenizer": "f", "dataset": "d", "views": ("original", "flip"), "shards": (entry,)}
    write_manifest(folder, TokenManifest(layout=SCALES, samples=30, **told))
    return folder, torch.from_numpy(tokens)


def found(*asked, **more):
    return evaluate_tokens(AskedOfTokens(*map(str, asked), **more), QUIET)


def measured(rank, folder):
    return {figure.name: figure.value for figure in found(folder, batch_size=7).figures}


def test_figures_of_shards_are_those_of_all_their_tokens(shards, tmp_path):
    folder, tokens = shards
    evaluation = found(folder, side_bits=8, batch_size=7)
    expected = TokenStatistics(SCALES, 8).update(tokens.flatten(0, 1)).compute()
    figures = {figure.name: figure for figure in evaluation.figures}
    assert list(figures) == ["usage", "perplexity", "entropy", "bits", "entropy_bits"]
    assert figures["usage"].value == 0.5
    assert figures["entropy"].parts["scale 2 stream 2"] == expected.by_scale[1].entropy[1]
    assert figures["perplexity"].parts["stream 1"] == expected.perplexity[0]
    assert figures["bits"].value == 5 * (2 + 4) + 8
    assert figures["entropy_bits"].value == pytest.approx(expected.entropy_bits)
    assert "; 8 bits of side information" in figures["bits"].definition
    again = found(folder.parent, side_bits=8)  # the run folder stands for its tokens
    assert [figure.value for figure in again.figures] == [figure.value for figure in evaluation.figures]

    write_evaluation(tmp_path / "out", evaluation)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2  # the brand and the codes
    assert "Tokens of 30 images" in page
    assert figures["entropy"].spread() in (tmp_path / "out" / "report.md").read_text()
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["tokens"]["tokenizer"] == "f"
    path = tmp_path / "out" / "results.json"
    assert {row.name for row in compared(path, path)} == figures.keys()


def test_a_tokenizer_encodes_images(tmp_path):
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3)).astype(np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{index}.png")
    options = registry().options("tokenizer", "tiles")
    tokenizer = options(preprocessing=Preprocessing(image_size=16, channels=3, fit="pad")).build()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    evaluation = found(f"tokenizer:{tmp_path / 'tokenizer'}", tmp_path / "images", batch_size=3)
    tokens = tokenizer.encode(torch.from_numpy(pixels).movedim(-1, 1) / 127.5 - 1)
    expected = TokenStatistics(tokenizer.layout()).update(tokens).compute()
    assert [figure.value for figure in evaluation.figures] == pytest.approx(
        [expected.usage[0], expected.perplexity[0], expected.entropy[0], 64 * 4, expected.entropy_bits]
    )
    assert not any(figure.parts for figure in evaluation.figures)
    (fewer, *_) = found(f"tokenizer:{tmp_path / 'tokenizer'}", tmp_path / "images", count=1).figures
    assert "tokens of 1 images" in fewer.measured


def test_progress_counts_images_and_not_their_views(shards, monkeypatch):
    seen = []

    @contextmanager
    def progress(self, title, total, done=0, unit="it"):
        yield lambda amount=1, note=None: seen.append((amount, total))

    monkeypatch.setattr(Reporter, "progress", progress)
    found(shards[0], batch_size=20)
    assert seen == [(20, 30), (10, 30)]


def test_shards_without_samples(tmp_path):
    entry = write_token_shard(tmp_path / shard_name(0), [], np.zeros((0, 1, 5, 2), int), [], SCALES)
    told = {"classes": ("a",), "tokenizer": "f", "dataset": "d", "views": ("original",), "shards": (entry,)}
    write_manifest(tmp_path, TokenManifest(layout=SCALES, samples=0, **told))
    with pytest.raises(UserError) as error:
        found(tmp_path)
    assert str(error.value) == f"{tmp_path} holds no tokens: its shards are empty"


@pytest.mark.slow
def test_processes_share_the_tokens(shards):
    first, second = run_in_processes(measured, str(shards[0]))
    assert first == measured(0, shards[0])
    assert second == {}


def test_what_does_not_go_together_is_a_sentence(shards, tmp_path):
    for asked, sentence in (
        (("tokenizer:x",), "evaluate tokens: tokenizer:x needs images to encode: give them second"),
        (("x", "y"), "evaluate tokens: only tokenizer:NAME takes images, x holds tokens"),
        (("x",), "x does not exist; expected a folder of token shards, as `smalti tokenize` writes it"),
    ):
        with pytest.raises(UserError) as error:
            found(*asked)
        assert str(error.value) == sentence
