"""kill -9 at random moments of every stage, and Ctrl-C: the same command goes on and ends with the same files."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from smalti.core.run_folder import RunFolder

pytestmark = pytest.mark.slow
STAGES = ("train-tokenizer", "tokenize", "train-generator", "sample", "evaluate")
KILLS_PER_STAGE = 4  # and once more where the last one came after the stage's end


def done(run, stage):
    return bool(run.stages().get(stage, {}).get("done"))


def current(run):
    """The first stage that is not done, or None."""
    return next((stage for stage in STAGES if not done(run, stage)), None)


def test_twenty_kills(finished, smalti, shrunk, files):
    run = RunFolder(smalti.folder / "run")
    record = run.state / "stages.json"
    source = random.Random(os.environ.get("SMALTI_KILL_SEED", "0"))
    kills = dict.fromkeys(STAGES, 0)
    for stage in STAGES:
        while kills[stage] < KILLS_PER_STAGE and not done(run, stage):
            launched = record.stat().st_mtime_ns if record.exists() else 0
            process = smalti.start("quickstart", *shrunk, "--out", "run")
            # A process records the stage that it goes on with, then works; the kill hits it there. What comes
            # before the stage is left undisturbed, or it would never be through.
            while not (record.exists() and record.stat().st_mtime_ns != launched and current(run) == stage):
                assert process.poll() is None, process.communicate()
                time.sleep(0.005)
            time.sleep(source.uniform(0, 0.5))
            where = current(run)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if where is not None:
                kills[where] += 1
    assert all(kills.values()), kills
    assert sum(kills.values()) >= KILLS_PER_STAGE * len(STAGES), kills
    smalti("quickstart", *shrunk, "--out", "run")
    assert files(run.path) == files(finished)
    leftovers = [path for path in run.path.rglob(".*") if path.is_file()]
    assert leftovers == []


def test_kills_against_a_discriminator(smalti, shrunk, undisturbed):
    """With everything that has a state: adaptive weight, LeCam, R1, augmentation, warm-up, both optimizers, the EMA."""
    adversarial = (
        "{discriminator: {name: patchgan, width: 8, layers: 1}, start: 5, discriminator_start: 2, warmup_steps: 5, "
        "adaptive: true, lecam: {}, r1: 0.1, augment: {blur_until: 10, blur_fade: 20}}"
    )
    validation = "{every: 25, images: 16, pictures: 4, best: {metric: ssim}}"
    changes = (
        *shrunk,
        f"train.tokenizer.adversarial={adversarial}",
        f"train.tokenizer.validation={validation}",
        "train.tokenizer.checkpoint_every=7",
    )
    command = ("train", "tokenizer", "quickstart", *changes, "--out", "run")
    undisturbed(*command)
    path = smalti.folder / "run" / "state" / "train-tokenizer.pt"
    source = random.Random(os.environ.get("SMALTI_KILL_SEED", "0"))
    kills = 0
    wanted = int(os.environ.get("SMALTI_ADVERSARIAL_KILLS", "3"))
    run = RunFolder(smalti.folder / "run")
    while kills < wanted:
        if done(run, "train-tokenizer"):
            shutil.rmtree(run.path)
        launched = path.stat().st_mtime_ns if path.exists() else 0
        process = smalti.start(*command)
        # The next checkpoint tells that steps are being made; the kill comes at any time after it.
        while not (path.exists() and path.stat().st_mtime_ns != launched):
            if process.poll() is not None:
                break
            time.sleep(0.002)
        time.sleep(source.uniform(0, 0.4))
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if alive and not done(run, "train-tokenizer"):
            kills += 1
    smalti(*command)
    names = ("models", "optimizers", "ema", "task", "validator", "ranks")
    found, expected = (
        torch.load(folder / path.relative_to(smalti.folder)) for folder in (smalti.folder, undisturbed.folder)
    )
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)
    assert "adversarial" in run.metrics("train-tokenizer")[-1]
    for name in ("tokenizer", "tokenizer-best", "images", "metrics.jsonl"):
        whole = undisturbed.folder / "run" / name
        for file in [whole] if whole.is_file() else sorted(whole.iterdir()):
            assert (run.path / file.relative_to(undisturbed.folder / "run")).read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("stage", ["train-tokenizer", "train-generator"])
def test_ctrl_c_is_told_and_goes_on(finished, smalti, shrunk, files, stage):
    process = smalti.start("quickstart", *shrunk, "--out", "run")
    run = RunFolder(smalti.folder / "run")
    while not (run.state / f"{stage}.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.endswith("smalti: interrupted; the same command goes on from here\n")
    assert "Traceback" not in stderr
    smalti("quickstart", *shrunk, "--out", "run")
    assert files(run.path) == files(finished)


def test_a_second_command_in_the_same_folder_is_refused(finished, smalti, shrunk):
    shutil.copytree(finished, smalti.folder / "run")
    run = RunFolder(smalti.folder / "run")
    with run.locked():
        _, stderr = smalti("quickstart", *shrunk, "--out", "run", code=2)
    assert stderr == "smalti: another process is working in run\n"
