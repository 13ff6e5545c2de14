"""One process or two: the same tokens and samples, and replicas that never part."""

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from smalti.core.run_folder import RunFolder
from smalti.core.weights import read_tensors

pytestmark = pytest.mark.slow
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LOSSES = {"tokenizer": "l2", "generator": "cross_entropy"}
# Batch normalisation in a discriminator follows each process's own batches, as DDP has it; nothing reads it.
BATCH_STATISTICS = {"blocks.3.running_mean", "blocks.3.running_var"}


def copy_without(finished, target, *stages):
    """A copy of the run in which some stages have not run yet."""
    shutil.copytree(finished, target)
    run = RunFolder(target)
    outputs = {"tokenize": ("tokens",), "sample": ("samples",), "evaluate": ("evaluation", "summary.json")}
    for stage in stages:
        run.remove(outputs[stage])
        run.record(stage, done=False)
    return run


@pytest.mark.parametrize("stage", ["tokenize", "sample"])
def test_two_processes_make_the_same_files_as_one(finished, smalti, files, stage):
    run = copy_without(finished, smalti.folder / "run", stage, "evaluate")
    smalti.two(stage, "run")
    folder = {"tokenize": "tokens", "sample": "samples"}[stage]
    expected = {name: content for name, content in files(finished).items() if name.startswith(folder)}
    found = {name: content for name, content in files(run.path).items() if name.startswith(folder)}
    assert found.keys() == expected.keys()
    assert found == expected


def test_two_processes_run_the_whole_pipeline(smalti, shrunk):
    smalti.two("run", "quickstart", *shrunk, "--out", "run")
    run = smalti.folder / "run"
    assert all(stage["done"] for stage in RunFolder(run).stages().values())
    assert (run / "report.html").exists()


def test_replicas_end_with_equal_weights(smalti, shrunk):
    """A tokenizer and its discriminator, two optimizers, an EMA: after 25 steps both processes hold the same bits."""
    adversarial = "{discriminator: {name: patchgan, width: 8, layers: 1}, weight: 0.1}"
    overrides = [*shrunk, "train.tokenizer.steps=25", f"train.tokenizer.adversarial={adversarial}"]
    script = Path(__file__).parent / "replica.py"
    smalti("run", "quickstart", *overrides, launcher=(*TORCHRUN, str(script)))
    for model in ("tokenizer", "discriminator"):
        first, second = (read_tensors(smalti.folder / f"rank-{rank}-{model}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        for name in first.keys() - BATCH_STATISTICS:
            assert torch.equal(first[name], second[name]), name
    saved = read_tensors(smalti.folder / "run" / "tokenizer" / "model.safetensors")
    first = read_tensors(smalti.folder / "rank-0-tokenizer.safetensors")
    assert all(torch.equal(saved[name], first[name]) for name in saved)


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_a_stage_goes_on_in_two_processes_and_then_in_one(smalti, shrunk, stage):
    """Killed at its first checkpoint, then in two processes up to their first one, then in one to the end."""
    long = (*shrunk, f"train.{stage}.steps=300")
    run = RunFolder(smalti.folder / "run")
    if stage == "generator":
        smalti("train", "tokenizer", "quickstart", *long, "--out", "run")
        smalti("tokenize", "quickstart", *long, "--out", "run")
    path = run.state / f"train-{stage}.pt"
    command = ("train", stage, "quickstart", *long, "--out", "run")
    seen = []
    for launcher in (("-m", "smalti"), (*TORCHRUN, "-m", "smalti")):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = smalti.start(*command, launcher=launcher)
        while not (path.exists() and path.stat().st_mtime_ns != before):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        kill_all(process)
        state = torch.load(path, weights_only=True)
        seen.append((state["step"], len(state["ranks"])))
    smalti(*command)
    (first, one), (second, two) = seen
    assert 0 < first < second < 300
    assert (one, two) == (1, 2)
    lines = run.metrics(f"train-{stage}")
    assert [line["step"] for line in lines] == [*range(10, 301, 10)]
    assert lines[-1][LOSSES[stage]] < lines[0][LOSSES[stage]]


def kill_all(process):
    """End it and what it started, which torchrun gives sessions of their own."""
    children = [
        int(child)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    for number in (process.pid, *children):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    process.communicate()
