"""kill -9 at random moments of every stage, and Ctrl-C: the same command goes on and ends with the same files."""

import multiprocessing
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
KILLS_PER_STAGE = 4  # in a run, where the stage is not through before
KILLS = int(os.environ.get("SMALTI_KILLS", "20"))
SECONDS = 0.4  # of work after which the kill comes at the latest
# What the processes import, once for all of them.
IMPORTED = ["smalti.core.pipeline", "smalti.core.backbones.cnn", "smalti.quant.vector", "smalti.generation.ar"]
IMPORTED += ["smalti.core.data.webdataset", "smalti.core.losses.pixel", "smalti.eval.evaluate"]


def done(run, stage):
    return bool(run.stages().get(stage, {}).get("done"))


def current(run):
    """The first stage that is not done, or None."""
    return next((stage for stage in STAGES if not done(run, stage)), None)


@pytest.fixture
def start(smalti, shrunk, monkeypatch):
    """Start the shrunken quickstart in a fork of a process that has imported everything, and so begins at once."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    arguments = ["smalti", "quickstart", *shrunk, "--out", "run"]
    program = (
        f"import os, sys; os.chdir({str(smalti.folder)!r}); sys.argv = {arguments!r}; "
        "from smalti.core.cli import main; main()"
    )

    def start():
        process = context.Process(target=exec, args=(program, {}))
        process.start()
        return process

    return start


def test_random_kills(finished, smalti, shrunk, files, start):
    """SMALTI_KILLS of them, a few in every stage of a run, and as many runs as that takes."""
    run = RunFolder(smalti.folder / "run")
    record = run.state / "stages.json"
    source = random.Random(os.environ.get("SMALTI_KILL_SEED", "0"))
    kills, runs = dict.fromkeys(STAGES, 0), 0
    while sum(kills.values()) < KILLS:
        shutil.rmtree(run.path, ignore_errors=True)
        for stage in STAGES:
            before = kills[stage]
            while kills[stage] < before + KILLS_PER_STAGE and not done(run, stage):
                launched = record.stat().st_mtime_ns if record.exists() else 0
                process = start()
                # A process records the stage that it goes on with, then works; the kill hits it there. What comes
                # before the stage is left undisturbed, or it would never be through.
                while not (record.exists() and record.stat().st_mtime_ns != launched and current(run) == stage):
                    assert process.is_alive(), process.exitcode
                    time.sleep(0.002)
                time.sleep(source.uniform(0, SECONDS))
                where = current(run)
                process.kill()
                process.join()
                if where is not None:
                    kills[where] += 1
        smalti("quickstart", *shrunk, "--out", "run")
        assert files(run.path) == files(finished)
        assert [path for path in run.path.rglob(".*") if path.is_file()] == []
        runs += 1
    assert all(kills.values()), kills
    print(f"{sum(kills.values())} kills in {runs} runs: {kills}")


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


@pytest.mark.parametrize(
    "command",
    [
        ("run",),
        ("train", "tokenizer"),
        ("tokenize",),
        ("train", "generator"),
        ("sample",),
        ("evaluate",),
    ],
    ids=" ".join,
)
def test_a_second_command_in_the_same_folder_is_refused(tmp_path, in_small, command):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        code, said = in_small(*command, "vqvae-ar", out=run.path)
    assert (code, said) == (2, f"another process is working in {run.path}")
    assert [path.name for path in run.state.iterdir()] == ["lock"]


def test_a_second_command_beside_a_stage_at_work_is_refused(finished, smalti, shrunk, files, in_small):
    """The first one is held in the middle of every stage, and goes on as if nothing had been."""
    run = RunFolder(smalti.folder / "run")
    first = smalti.start("quickstart", *shrunk, "--out", "run")
    held = set()
    while first.poll() is None:
        os.kill(first.pid, signal.SIGSTOP)
        stage = current(run)
        if stage not in held and stage in run.stages():
            code, said = in_small("run", "vqvae-ar", out=run.path)
            assert (code, said) == (2, f"another process is working in {run.path}")
            held.add(stage)
        os.kill(first.pid, signal.SIGCONT)
        time.sleep(0.02)
    _, stderr = first.communicate()
    assert first.returncode == 0, stderr
    assert held == set(STAGES)
    assert files(run.path) == files(finished)
