"""Training goes on with another number of processes: every image once, sums and health of all."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from smalti.core.data.folders import FolderOptions
from smalti.core.data.loader import TrainBatches
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.testing.processes import run_in_processes
from smalti.core.training.checkpoint import own_state
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.options import Optimization
from smalti.core.training.task import Task
from smalti.core.training.token_health import TokenHealth

IMAGES = 30


class Fit(Task):
    """Grey levels to a line, noting which images it sees."""

    def __init__(self):
        torch.manual_seed(0)
        self.models = {"line": torch.nn.Linear(1, 1)}
        layout = TokenLayout.sequence(1, (256,))
        self.health = TokenHealth(SimpleNamespace(layout=lambda: layout, codebooks=layout.streams))
        self.seen = []

    def objectives(self, models, batch, step):
        self.seen.append((step, batch.keys))
        grey = batch.images.mean((1, 2, 3))[:, None]
        self.health.update(((grey[..., None] + 1) * 127.5).round().long())
        yield "line", {"fit": (models["line"](grey) - batch.labels[:, None]).square().mean()}


def part(rank, folder, steps):
    """Train up to a number of steps, in however many processes there are: what was seen, weights, the next figures."""
    from smalti.core import distributed

    run = RunFolder(Path(folder) / "run")
    run.state.mkdir(parents=True, exist_ok=True)
    context = SimpleNamespace(run=run, recipe=SimpleNamespace(seed=1), device="cpu", reporter=Reporter(quiet=True))
    content = {"batch_size": 6, "learning_rate": 0.01, "schedule": "constant", "log_every": 4, "checkpoint_every": 1}
    optimization = Optimization(steps=steps, **content)
    batches = TrainBatches(
        FolderOptions(path=str(Path(folder) / "images")).build(),
        Preprocessing(image_size=4, channels=1, fit="pad"),
        micro_batch(optimization),
        seed=0,
        rank=rank,
        world_size=distributed.world_size(),
        max_undecodable=0,
        warn=print,
    )
    task = Fit()
    train(task, batches, optimization, stage="test", context=context)
    return task.seen, task.models["line"].state_dict(), task.health.findings()


@pytest.fixture
def folder(tmp_path):
    from PIL import Image

    for index in range(IMAGES):
        path = tmp_path / "images" / "only" / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 8 * index).save(path)
    return tmp_path


@pytest.mark.slow
def test_two_processes_then_one_then_two(folder):
    """Steps 1 to 3, 4 to 6, 7 to 10: two epochs of 30 images, the same weights as in one process all along."""
    whole = folder / "whole"
    whole.mkdir()
    (whole / "images").symlink_to(folder / "images")
    (expected, weights, figures) = part(0, str(whole), 10)
    first = run_in_processes(part, str(folder), 3)
    second = part(0, str(folder), 6)
    third = run_in_processes(part, str(folder), 10)
    seen = {}
    for one in (*first, second, *third):
        for step, keys in one[0]:
            seen.setdefault(step, []).extend(keys)
    assert {step: sorted(keys) for step, keys in seen.items()} == {step: sorted(keys) for step, keys in expected}
    for epoch in (range(5), range(5, 10)):
        assert len({key for step in epoch for key in seen[step]}) == IMAGES
    assert torch.equal(third[0][1]["weight"], third[1][1]["weight"])
    torch.testing.assert_close(third[0][1], weights)
    assert third[0][2] == third[1][2] == figures
    lines, undisturbed = (RunFolder(path / "run").metrics("test") for path in (folder, whole))
    # A run that ends writes a last line, so the sums of steps 4 to 6 and 7, 8 are apart.
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 10]
    assert lines[-1]["fit"] == pytest.approx(undisturbed[-1]["fit"])


def state(tokens, fit, summed, records):
    health = {"histograms": [], "latest": [torch.tensor(tokens)], "scales": []}
    position = {"epoch": 0, "records": records, "first": 0, "undecodable": 0, "ahead": ()}
    return {
        "batches": position,
        "sums": {"fit": fit},
        "summed": summed,
        "health": {"health": health, "watch": {"best": [0.5], "collapsed": [False]}},
    }


def test_what_processes_remember_is_dealt_out():
    states = [state([1, 2, 3], 1.5, 2, 5), state([4, 5], 2.0, 2, 6)]
    assert own_state(states, 1, 2) is states[1]
    (only,) = (own_state(states, rank, 1) for rank in range(1))
    assert only["sums"] == {"fit": 3.5}
    assert only["summed"] == 4
    assert only["batches"]["records"] == 6
    assert only["health"]["health"]["latest"][0].tolist() == [1, 2, 4, 3, 5]  # the newest of both come last
    three = [own_state(states, rank, 3) for rank in range(3)]
    assert [own["sums"] for own in three] == [{"fit": 3.5}, {"fit": 0.0}, {"fit": 0.0}]
    assert [own["health"]["health"]["latest"][0].tolist() for own in three] == [[1, 3], [2, 5], [4]]
    assert all(own["health"]["watch"] == {"best": [0.5], "collapsed": [False]} for own in three)
