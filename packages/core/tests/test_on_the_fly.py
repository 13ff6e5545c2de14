"""Generators learn from images whose tokens are made in the process."""

from collections import defaultdict

import pytest
import torch
from pydantic import ValidationError

from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.encoded_batches import EncodedBatches
from smalti.core.data.loader import TrainBatches
from smalti.core.data.token_shards import read_token_shards
from smalti.core.data.views import Views
from smalti.core.errors import UserError
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.training import loop


def context_of(content, folder):
    recipe = Recipe.model_validate({**content, "evaluate": None})
    run = RunFolder(folder)
    run.state.mkdir(parents=True, exist_ok=True)
    return Context(run, recipe, "cpu", Reporter(quiet=True))


def ran(content, folder, stages=None):
    Pipeline(context_of(content, folder)).run(stages)


def epoch_of(content, tokenizer, views, batch_size=8, images=24):
    dataset = Recipe.model_validate(content).data.train.build()
    reader = TrainBatches(
        dataset,
        tokenizer.preprocessing,
        batch_size,
        seed=3,
        rank=0,
        world_size=1,
        max_undecodable=0,
        warn=print,
        augment=views,
    )
    keys = defaultdict(list)
    encode = EncodedBatches(reader, tokenizer, at_once=3)
    for _ in range(images // batch_size):
        state = encode.state_dict()
        batch = next(encode)
        reader.load_state_dict(state)
        for key, row, label in zip(next(reader).keys, batch.tokens, batch.labels, strict=True):
            keys[key].append((row, int(label)))
    return keys


@pytest.mark.parametrize("views", [{}, {"flip": True}, {"ten_crops": [1.5, 1.25]}])
def test_tokens_and_losses_are_those_of_the_shards(content, tmp_path, views):
    content["tokenize"] = {"batch_size": 4, "shard_size": 10, **views}
    ran(content, tmp_path / "run", ["train-tokenizer", "tokenize", "train-generator"])
    run = RunFolder(tmp_path / "run")
    stored, tokenizer = read_token_shards(run / "tokens"), Tokenizer.from_pretrained(run / "tokenizer")
    generator = Generator.from_pretrained(run / "generator")
    chosen = Views(content["tokenize"].get("flip", False), tuple(content["tokenize"].get("ten_crops", ())))
    assert chosen.names == stored.views
    found = epoch_of(content, tokenizer, chosen)
    assert len(found) == 24
    used = set()
    for key, ((tokens, label),) in found.items():
        number = int(key)
        assert label == stored.labels[number]
        kept = torch.from_numpy(stored.tokens[number].astype("int64"))
        (equal,) = (kept == tokens).all(-1).all(-1).nonzero(as_tuple=True)
        used.update(equal.tolist())
        row = kept[equal[:1]]
        labels = torch.tensor([label])
        assert torch.equal(
            generator.loss(tokens[None], labels)["cross_entropy"], generator.loss(row, labels)["cross_entropy"]
        )
    assert len(used) > len(chosen.names) // 2


def test_a_run_without_shards_goes_on_where_it_was_killed(content, tmp_path, monkeypatch):
    content["tokenize"] |= {"on_the_fly": True}
    ran(content, tmp_path / "run")
    run, killed = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "killed")
    assert not (run / "tokens").exists()
    assert (run / "samples" / "samples.npz").exists()
    steps = []
    whole_update = loop._Loop._update

    def dying(self):
        if self.stage == "train-generator":
            steps.append(self.step)
            if len(steps) == 6:
                raise KeyboardInterrupt
        whole_update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KeyboardInterrupt):
            ran(content, killed.path)
        ran(content, killed.path)
    assert steps == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]
    for name in ("generator/model.safetensors", "generator/trained_on.json", "samples/samples.npz"):
        assert (run / name).read_bytes() == (killed / name).read_bytes()


def test_images_that_changed_are_trained_on_again(content, tmp_path):
    """The stage depends on the data and the views, which with shards another stage answers for."""
    content["tokenize"] |= {"on_the_fly": True}
    before = Pipeline(context_of(content, tmp_path / "run")).fingerprints
    content["tokenize"] |= {"flip": False}
    after = Pipeline(context_of(content, tmp_path / "run")).fingerprints
    assert before.keys() == after.keys() == {"train-tokenizer", "train-generator", "sample"}
    assert before["train-tokenizer"] == after["train-tokenizer"]
    assert before["train-generator"] != after["train-generator"]


def test_mistakes_are_told(content, tmp_path):
    on_the_fly = {"on_the_fly": True}
    stored = {"stored": {"name": "jsonl", "path": "x"}, **on_the_fly}
    with pytest.raises(ValidationError, match="stored tokens are there already: leave on_the_fly out"):
        Recipe.model_validate({**content, "tokenize": stored})
    with pytest.raises(UserError) as told:
        ran({**content, "tokenize": on_the_fly}, tmp_path / "run", ["tokenize"])
    assert str(told.value) == "tokenize.on_the_fly makes no token shards: go on with `smalti train generator`"
