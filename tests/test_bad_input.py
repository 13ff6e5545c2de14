"""What a user reads after a mistake: one line, exit code 2, and nothing lost."""

import os
import shutil
import sys
import warnings

import numpy as np
import pytest

from smalti.core.cli import main
from smalti.core.run_folder import RunFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def told(smalti, monkeypatch, capsys):
    """Run a command that must fail, in this process, which has everything imported already; its one line."""
    monkeypatch.chdir(smalti.folder)
    # What the command line changes in its process comes back at the end.
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "1000"))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def told(*arguments):
        monkeypatch.setattr(sys, "argv", ["smalti", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        stderr = capsys.readouterr().err
        lines = [line for line in stderr.splitlines() if line.startswith("smalti: ")]
        assert len(lines) == 1, stderr
        assert "Traceback" not in stderr
        return lines[0].removeprefix("smalti: ")

    return told


@pytest.fixture
def run(finished, smalti):
    shutil.copytree(finished, smalti.folder / "run")
    return RunFolder(smalti.folder / "run")


def reopen(run, *stages):
    for stage in stages:
        run.record(stage, done=False)


def test_data_that_is_not_there(told, smalti):
    assert told("run", "quickstart", "data.train.shards=photos/*.tar", "data.train.classes=2").startswith(
        "no shard matches photos/*.tar: there is no folder photos"
    )
    (smalti.folder / "photos").mkdir()
    assert "the folder photos is empty" in told(
        "run", "quickstart", "data.train.shards=photos/*.tar", "data.train.classes=2", "--out", "other"
    )


def test_damaged_tokenizer_weights(told, run):
    file = run / "tokenizer" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    reopen(run, "tokenize")
    shutil.rmtree(run / "tokens")
    assert told("tokenize", "run").startswith("run/tokenizer/ema.safetensors is damaged or not a safetensors file: ")


def test_token_shards_of_another_tokenizer(told, run):
    file = run / "tokenizer" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x11
    file.write_bytes(content)
    reopen(run, "train-generator")
    assert "were made by another tokenizer" in told("train", "generator", "run")
    run.record("train-generator", done=True)
    reopen(run, "sample")
    assert "was trained on tokens of another tokenizer" in told("sample", "run")


def test_a_damaged_token_shard(told, run):
    shard = run / "tokens" / "tokens-000001.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    reopen(run, "train-generator")
    assert "run/tokens/tokens-000001.tar is damaged or incomplete after" in told("train", "generator", "run")


def test_samples_that_are_damaged(told, run):
    np.savez(run / "samples" / "samples.npz", arr_0=np.zeros((4, 8, 8), np.uint8))
    reopen(run, "evaluate")
    assert "samples.npz" in told("evaluate", "run")


def test_a_generator_that_cannot_take_the_layout(told, smalti, run):
    """Scales: the AR generator predicts one token after the other."""
    layout = run / "tokens" / "layout.json"
    layout.write_text(layout.read_text().replace('"kind": "grid"', '"kind": "scales"'))
    reopen(run, "train-generator")
    assert told("train", "generator", "run").startswith(
        "generator 'ar' cannot take the layout scales 8x8, 1 stream of 32"
    )


def test_options_with_their_path(told):
    assert "tokenizer.quantizer.codebook_size: Input should be a valid integer" in told(
        "run", "quickstart", "tokenizer.quantizer.codebook_size=many"
    )
    assert told("run", "quickstart", "generator.name=diffusion").endswith(
        "unknown generator 'diffusion'; installed: ar, far, maskgit, rar, var"
    )
