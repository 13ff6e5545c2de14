from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smalti.core import distributed
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.testing.processes import run_in_processes
from smalti.core.training import loop
from smalti.core.training.loop import train
from smalti.core.training.options import Optimization
from smalti.core.training.schedule import multiplier
from smalti.core.training.task import Task
from smalti.core.training.token_health import TokenHealth


class Numbers:
    """Batches that count."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        return (torch.randn(4, 3, generator=generator),)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Pair(Task):
    """A generator and a discriminator, linear both, with dropout so that randomness counts."""

    def __init__(self):
        torch.manual_seed(0)
        self.models = {"G": nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)), "D": nn.Linear(3, 1)}

    def objectives(self, models, batch, step):
        (x,) = batch
        made = models["G"](x)
        value = (made - x).square().mean() - 0.1 * self.models["D"](made).mean().detach()
        yield "G", {"fit": value}
        yield "D", {"judge": models["D"](made.detach()).square().mean() - models["D"](x).mean()}


@pytest.fixture
def context(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.state.mkdir(parents=True)
    return SimpleNamespace(run=folder, recipe=SimpleNamespace(seed=1), device="cpu", reporter=Reporter(quiet=True))


def options(**changes):
    return Optimization.model_validate(
        {"steps": 12, "batch_size": 4, "learning_rate": 0.01, "checkpoint_every": 5, "log_every": 3, **changes}
    )


def run(context, optimization, task=None):
    task = task or Pair()
    averaged = train(task, Numbers(), optimization, stage="test", context=context)
    return task, averaged


def test_accumulation_steps_both_optimizers(context, monkeypatch):
    """One context per model, and only the model entered last would ever step."""
    steps = Counter()

    class Counted(torch.optim.AdamW):
        def step(self, *arguments, **keywords):
            steps[self.param_groups[0]["params"][0].shape[0]] += 1
            return super().step(*arguments, **keywords)

    monkeypatch.setattr(loop.torch.optim, "AdamW", Counted)
    run(context, options(steps=5, accumulate=4))
    assert steps == {3: 5, 1: 5}


def test_accumulated_gradients_equal_one_large_batch(context):
    class Fit(Task):
        def __init__(self):
            torch.manual_seed(0)
            self.models = {"G": nn.Linear(3, 3)}

        def objectives(self, models, batch, step):
            yield "G", {"fit": (models["G"](batch[0]) - 1).square().mean()}

    class Joined(Numbers):
        def __next__(self):
            return (torch.cat([super(Joined, self).__next__()[0] for _ in range(2)]),)

    parts, whole = Fit(), Fit()
    train(parts, Numbers(), options(steps=3, accumulate=2, batch_size=8), stage="parts", context=context)
    train(whole, Joined(), options(steps=3, batch_size=8), stage="whole", context=context)
    torch.testing.assert_close(parts.models["G"].weight, whole.models["G"].weight)


class Tokens(Pair):
    """Beside the pair, tokens: all codes at first, from step 6 on only the first two."""

    def __init__(self):
        super().__init__()
        layout = TokenLayout.scales(((1, 1), (1, 3)), (8,))
        self.health = TokenHealth(SimpleNamespace(layout=lambda: layout, codebooks=layout.streams))
        self.health.health.queue = self.health.health.scales[1].queue = 64

    def objectives(self, models, batch, step):
        tokens = torch.randint(8 if step < 6 else 2, (5, 4, 1))
        self.health.update(tokens)
        yield from super().objectives(models, batch, step)


def test_a_collapse_is_named_with_its_step(context, monkeypatch):
    said = []
    monkeypatch.setattr(context.reporter, "say", said.append)
    run(context, options(log_every=1), Tokens())
    lines = context.run.metrics("test")
    usage = [line["codebook_health"]["usage"][0] for line in lines]
    (step,) = (line["step"] for line in lines if "collapsed" in line["codebook_health"])
    best = max(usage[:step])
    assert usage[step - 1] < best / 2 <= usage[step - 2]
    assert lines[step - 1]["codebook_health"]["collapsed"] == [0]
    assert said == [
        f"test: codebook collapse at step {step}: usage fell to less than half of its best "
        f"(stream 0 from {best:.1%} to {usage[step - 1]:.1%})"
    ]
    assert [len(line["codebook_health"]["usage_of_scales"]) for line in lines] == [2] * 12
    assert lines[-1]["codebook_health"] | {"perplexity": None} == {
        "usage": [0.25],
        "perplexity": None,
        "dead_codes": [6.0],
        "usage_of_scales": [[1.0], [0.25]],
    }


@pytest.mark.parametrize("kind", [Pair, Tokens])
@pytest.mark.parametrize("stop", [1, 4, 5, 7, 11])
def test_going_on_equals_never_stopping(context, tmp_path, monkeypatch, stop, kind):
    undisturbed, expected = run(context, options(), kind())
    lines = context.run.metrics("test")
    other = SimpleNamespace(**{**vars(context), "run": RunFolder(tmp_path / "other")})
    other.run.state.mkdir(parents=True)

    class KillError(Exception):
        """The end of a process."""

    update = loop._Loop._update

    def dying(self):
        if self.step == stop:
            raise KillError
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KillError):
            run(other, options(), kind())
    resumed, averaged = run(other, options(), kind())
    for name, model in undisturbed.models.items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, resumed.models[name].state_dict()[key])
    assert all(torch.equal(expected[name], averaged[name]) for name in expected)
    assert other.run.metrics("test") == lines
    assert [line["step"] for line in lines] == [3, 6, 9, 12]


def test_ctrl_c_saves_at_the_end_of_the_step(context, monkeypatch):
    import signal

    update = loop._Loop._update

    def interrupted(self):
        update(self)
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background
    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(context, options())
    assert signal.signal(signal.SIGINT, ignored) is signal.default_int_handler
    assert torch.load(context.run.state / "test.pt", weights_only=True)["step"] == 7


class Faulty(Pair):
    """The discriminator normalises by batches; at some steps one of the losses goes wrong, or its gradient does."""

    def __init__(self, fail_at=(), where="fit", rank=0):
        super().__init__()
        self.models["D"] = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
        self.fail_at, self.where, self.rank = fail_at, where, rank
        self.memory = 0.0
        layout = TokenLayout.sequence(4, (8,))
        self.health = TokenHealth(SimpleNamespace(layout=lambda: layout, codebooks=layout.streams))

    def state_dict(self):
        return {"memory": self.memory}

    def load_state_dict(self, state):
        self.memory = state["memory"]

    def objectives(self, models, batch, step):
        fails = self.where if step in self.fail_at and distributed.rank() == self.rank else ""
        self.memory += 1.0
        (x,) = batch
        self.health.update(torch.randint(8, (4, 4, 1)))
        made = models["G"](x)
        factor = float("nan") if fails == "fit" else 1.0
        yield "G", {"fit": (made - x).square().mean() * factor}
        real, fake = models["D"](x), models["D"](made.detach())
        # The root of 0 is 0, its derivative is not finite.
        root = ((fake - fake.detach()).sum()).sqrt() if fails == "gradient" else 0.0
        yield "D", {"judge": fake.square().mean() - real.mean() + root}


def everything(task):
    """All tensors of a task's models, by name."""
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in task.models.items()
        for key, tensor in model.state_dict().items()
    }


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        ("fit", "test: step 7 is skipped, the loss 'fit' is nan"),
        ("gradient", "test: step 7 is skipped, the gradient of 'D' is nan"),
    ],
)
def test_an_update_that_is_not_finite_changes_nothing(context, monkeypatch, where, sentence):
    said, around = [], {}
    monkeypatch.setattr(context.reporter, "say", said.append)
    update = loop._Loop._update

    def watched(self):
        before = everything(self.task)
        update(self)
        around[self.step] = (before, everything(self.task), self.task.memory, self.ema.updates)

    monkeypatch.setattr(loop._Loop, "_update", watched)
    task = Faulty((7,), where)
    run(context, options(), task)
    assert said == [sentence]
    before, after, memory, averaged = around[7]
    assert memory == 7.0
    # The first model has stepped already where the second one goes wrong.
    kept = {name for name in before if not torch.equal(before[name], after[name])}
    assert kept == (set() if where == "fit" else {name for name in before if name.startswith("G.")})
    assert averaged == (7 if where == "fit" else 8)
    assert all(torch.isfinite(tensor).all() for tensor in everything(task).values())
    assert len(task.health.state_dict()["health"]["latest"][0]) == 4 * 4 * (11 if where == "fit" else 12)
    lines = context.run.metrics("test")
    assert [line.get("skipped") for line in lines] == [None, None, 1, None]
    assert all(isinstance(line["fit"], float) for line in lines)


def test_a_training_that_goes_wrong_for_good_ends(context, monkeypatch):
    said = []
    monkeypatch.setattr(context.reporter, "say", said.append)
    task = Faulty(range(6, 100))
    with pytest.raises(UserError) as raised:
        run(context, options(steps=50, max_skipped=5, log_every=1), task)
    path = context.run.state / "test.pt"
    assert str(raised.value) == (
        "test: 5 updates in a row were skipped, and then the loss 'fit' is nan at step 11; lower the learning rate or "
        f"clip the gradient (what {path} holds is kept)"
    )
    assert len(said) == 5
    assert torch.load(path, weights_only=True)["step"] == 5  # at step 10 nothing could be trusted


def test_no_update_may_be_skipped(context):
    with pytest.raises(UserError, match=r"^test: the loss 'fit' is nan at step 2; .* \(nothing was saved yet\)$"):
        run(context, options(max_skipped=0), Faulty((2,)))


def test_going_on_equals_never_stopping_around_skipped_updates(context, tmp_path, monkeypatch):
    undisturbed, expected = run(context, options(), Faulty((4, 5)))
    other = SimpleNamespace(**{**vars(context), "run": RunFolder(tmp_path / "other")})
    other.run.state.mkdir(parents=True)
    update = loop._Loop._update

    def dying(self):
        if self.step == 8:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KeyboardInterrupt):
            run(other, options(), Faulty((4, 5)))
    assert torch.load(other.run.state / "test.pt", weights_only=True)["step"] == 7  # 5 was due, but 4 was skipped
    resumed, averaged = run(other, options(), Faulty((4, 5)))
    found = everything(resumed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in everything(undisturbed).items())
    assert all(torch.equal(expected[name], averaged[name]) for name in expected)
    assert other.run.metrics("test") == context.run.metrics("test")


def faulty_replica(rank, folder):
    """A training in one of two processes, of which the second goes wrong at step 3, and the first is told."""
    run_folder = RunFolder(folder)
    run_folder.state.mkdir(parents=True, exist_ok=True)
    said = []
    reporter = SimpleNamespace(say=said.append, progress=Reporter(quiet=True).progress)
    context = SimpleNamespace(run=run_folder, recipe=SimpleNamespace(seed=1), device="cpu", reporter=reporter)
    task = Faulty((3,), rank=1)
    train(task, Numbers(), options(batch_size=8), stage="test", context=context)
    return everything(task), said


@pytest.mark.slow
def test_all_processes_skip_together(tmp_path):
    (first, said), (second, _) = run_in_processes(faulty_replica, str(tmp_path / "run"))
    assert said == ["test: step 3 is skipped, the loss 'fit' is nan"]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items() if "running" not in name)


class Small(Task):
    """A loss of which the gradients are below what float16 can hold, or far above."""

    def __init__(self, factor):
        torch.manual_seed(0)
        self.models = {"G": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))}
        self.factor = factor

    def objectives(self, models, batch, step):
        yield "G", {"fit": self.factor * (models["G"](batch[0]) - 1).square().mean()}


@pytest.mark.parametrize("factor", [1e-7, 1e3])
def test_float16_scales_the_loss(context, factor):
    seen = []
    task, exact = Small(factor), Small(factor)
    task.models["G"][0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    run(context, options(steps=20, schedule="constant", precision="float16", ema_decay=None), task)
    assert set(seen) == {torch.float16}
    skipped = sum(line.get("skipped", 0) for line in context.run.metrics("test"))
    assert (skipped > 0) == (factor > 1)
    scale = torch.load(context.run.state / "test.pt", weights_only=True)["scalers"]["G"]["scale"]
    assert scale == 2.0 ** (16 - skipped)
    steps = options(steps=20 - skipped, schedule="constant", ema_decay=None)
    later = Numbers()
    later.position = skipped
    train(exact, later, steps, stage="exact", context=context)
    start = Small(factor).models["G"][0].weight
    for layer, other in zip(task.models["G"], exact.models["G"], strict=True):
        assert layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight, other.weight, atol=0.02, rtol=0)
    assert bool(((task.models["G"][0].weight - start).abs() > 0.05).any())


def test_a_damaged_checkpoint(context):
    run(context, options(steps=5))
    path = context.run.state / "test.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"test.pt is damaged .*; remove it to train from the start"):
        run(context, options(steps=5))


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(UserError, match="batch_size 6 cannot be divided by 1 processes times 4 micro-batches"):
        loop.micro_batch(options(batch_size=6, accumulate=4))
    assert loop.micro_batch(options(batch_size=8, accumulate=4)) == 2


def test_bfloat16_keeps_weights_in_float32(context):
    seen = []

    task = Pair()
    task.models["G"][0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    run(context, options(steps=2, precision="bfloat16"), task)
    assert task.models["G"][0].weight.dtype == torch.float32
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_schedule():
    cosine = options(steps=101, warmup_steps=10, final_ratio=0.1)
    values = [multiplier(cosine, step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1.0
    assert values[55] == pytest.approx(0.55)
    assert values[100] == pytest.approx(0.1)
    assert multiplier(options(schedule="constant"), 11) == 1.0


def test_a_checkpoint_with_a_flipped_bit(context):
    """torch looks at no checksum: it would go on with other weights."""
    task, _ = run(context, options(steps=5))
    path = context.run.state / "test.pt"
    content = bytearray(path.read_bytes())
    content[content.index(task.models["G"][0].weight.detach().numpy().tobytes())] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"test.pt is damaged .*; remove it to train from the start"):
        run(context, options(steps=5))


@pytest.mark.parametrize("state", [[1], {}, {"step": 3, "skipped": 0, "models": {"G": {}, "D": None}}])
def test_a_checkpoint_of_another_training(context, state):
    path = context.run.state / "test.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    with pytest.raises(UserError, match=rf"{path} is no.* of .*training.*; remove it to train from the start"):
        run(context, options(steps=5))


@pytest.mark.parametrize("averages", [None, {"updates": "many", "weights": {}}, {"updates": 5, "weights": {}}])
def test_a_checkpoint_of_other_averages(context, averages):
    run(context, options(steps=5))
    path = context.run.state / "test.pt"
    torch.save(torch.load(path, weights_only=True) | {"ema": averages}, path)
    with pytest.raises(UserError, match=rf"{path} is not of this training .*; remove it to train from the start"):
        run(context, options(steps=5))
