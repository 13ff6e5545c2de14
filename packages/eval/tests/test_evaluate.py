import json
import re
import subprocess
import sys

import numpy as np
import pytest

from smalti.core.contracts import Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.eval import evaluate as module
from smalti.eval.classifier import Classifier
from smalti.eval.classifier_training import ClassifierTask


def evaluated(context):
    context.recipe.evaluate.build(context).run()
    return context.run


def outputs(run):
    """The files of an evaluation, with the time taken out."""
    files = {str(path.relative_to(run.path)): path.read_bytes() for path in (run / "evaluation").rglob("*.*")}
    summary = json.loads((run / "summary.json").read_text())
    files["summary"] = {name: value for name, value in summary.items() if name != "seconds"}
    files["report"] = re.sub(r"\d+<small> min</small> \d+<small> s</small>", "TIME", (run / "report.html").read_text())
    assert "TIME" in files["report"]
    return files


def test_the_figures_of_a_run(prepared, figure_names):
    run = evaluated(prepared())
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary) == [*figure_names, "seconds"]
    assert summary["seconds"] >= 120.5
    assert summary["classifier_accuracy"] == 1.0  # the three classes cannot be mistaken
    assert summary["classified_as_intended"] == pytest.approx(0.9)  # three samples look like another class
    assert 0 <= summary["frechet_distance_real"] < summary["frechet_distance"]
    assert 0 < summary["precision"] <= 1
    assert 0 < summary["recall"] <= 1

    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert list(results["figures"]) == figure_names
    assert "not FID" in results["protocol"]["note"]
    classifier = Classifier.from_pretrained(run / "evaluation" / "classifier")
    assert results["protocol"]["classifier"]["fingerprint"] == classifier.fingerprint
    assert classifier.fingerprint in results["figures"]["frechet_distance"]["extractor"]
    assert results["figures"]["frechet_distance"]["measured"] == "30 samples"
    assert results["figures"]["frechet_distance"]["reference"].startswith("30 validation images")
    assert results["classes"][0] == {
        "name": "bright left",
        "samples": 10,
        "classified_as_intended": 0.7,
        "validation_images": 10,
        "classifier_accuracy": 1.0,
    }
    report = (run / "report.html").read_text()
    assert "toy &amp; co" in report
    assert "&lt;flat&gt;" in report
    assert report.count("data:image/png") == 3 * 3 + 2 * 4


def test_reconstruction_figures_are_those_of_the_tokenizer(prepared):
    context = prepared()
    run = evaluated(context)
    tokenizer = Tokenizer.from_pretrained(run / "tokenizer")
    (batch,) = read_images(
        context.recipe.data.validation.build(), tokenizer.preprocessing, 64, max_undecodable=0, warn=pytest.fail
    )
    tokens = tokenizer.encode(batch.images)
    originals, copies = (to_uint8(images).numpy() / 255 for images in (batch.images, tokenizer.decode(tokens)))
    noise = [-10 * np.log10(np.mean((one - other) ** 2)) for one, other in zip(originals, copies, strict=True)]
    frequencies = np.bincount(tokens.flatten(), minlength=16) / tokens.numel()
    entropy = -sum(share * np.log(share) for share in frequencies if share)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["psnr"] == pytest.approx(np.mean(noise), rel=1e-9)
    assert summary["codebook_usage"] == np.mean(frequencies > 0)
    assert summary["codebook_perplexity"] == pytest.approx(np.exp(entropy), rel=1e-9)


def test_the_same_run_gives_the_same_bytes_and_another_seed_others(prepared):
    one = outputs(evaluated(prepared("one")))
    assert outputs(evaluated(prepared("two"))) == one
    assert outputs(evaluated(prepared("three", seed=1)))["summary"] != one["summary"]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("step", [0, 13, 29])
def test_a_killed_evaluation_goes_on(prepared, monkeypatch, step):
    whole = outputs(evaluated(prepared("whole")))
    context = prepared("killed")
    objectives = ClassifierTask.objectives

    def dying(self, models, batch, at):
        if at == step:
            raise KilledError
        return objectives(self, models, batch, at)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTask, "objectives", dying)
        with pytest.raises(KilledError):
            evaluated(context)
    with monkeypatch.context() as patch:
        patch.setattr(module, "measure_samples", lambda *arguments: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            evaluated(context)
    assert not (context.run / "summary.json").exists()
    assert outputs(evaluated(context)) == whole


def test_colour_images_and_classes_without_samples(prepared, samples):
    images, labels = samples
    chosen = labels != 2
    preprocessing = {"image_size": 16, "channels": 3, "fit": "pad"}
    context = prepared(
        images=images[chosen], labels=labels[chosen], tokenizer={"name": "tiles", "preprocessing": preprocessing}
    )
    run = evaluated(context)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert results["classes"][2]["samples"] == 0
    assert results["classes"][2]["classified_as_intended"] is None
    assert "no samples" in (run / "report.html").read_text()


def test_averaged_weights_are_the_ones_that_judge(prepared, content):
    options = content["evaluate"]
    averaging = {**options, "classifier": {**options["classifier"], "ema_decay": 0.5}}
    plain, averaged = prepared("plain"), prepared("averaged", evaluate=averaging)
    prints = [
        Classifier.from_pretrained(evaluated(context).path / "evaluation" / "classifier").fingerprint
        for context in (plain, averaged)
    ]
    assert prints[0] != prints[1]
    assert prints[1] in (averaged.run / "evaluation" / "results.json").read_text()


def test_samples_of_another_size_are_refused(prepared, samples):
    context = prepared(images=samples[0][:, :8, :8], labels=samples[1])
    with pytest.raises(UserError) as error:
        evaluated(context)
    path = context.run / "samples" / "samples.npz"
    assert str(error.value) == (
        f"{path} holds images of 8 x 8 pixels, the tokenizer's are 16 x 16: run `smalti sample` again"
    )


def test_a_sample_of_no_class_is_refused_before_any_work(prepared, samples):
    context = prepared(labels=np.where(np.arange(30) == 4, 7, samples[1]))
    with pytest.raises(UserError, match=r"image 4 has the label 7: with 3 classes, labels are 0 to 2$"):
        evaluated(context)
    assert not (context.run / "evaluation").exists()


def test_missing_samples_are_named(prepared):
    context = prepared()
    (context.run / "samples" / "samples.npz").unlink()
    with pytest.raises(UserError, match=r"samples.npz does not exist: run `smalti sample` first$"):
        evaluated(context)


def test_other_classes_to_train_on_are_refused(prepared, content):
    data = content["data"]
    context = prepared(data={**data, "train": {**data["train"], "classes": 5}})
    with pytest.raises(UserError, match=r"has 5 classes to train on, the validation images 3$"):
        evaluated(context)


def test_one_class_and_tiny_images_are_refused_before_any_work(prepared, content, samples):
    one = {name: {**options, "classes": 1} for name, options in content["data"].items()}
    context = prepared("one", data=one)
    with pytest.raises(UserError) as error:
        evaluated(context)
    assert str(error.value) == (
        f"{context.recipe.data.validation.build().name} has 1 classes, the classifier that judges samples needs 2 or "
        "more: leave evaluation out with evaluate=null"
    )
    tiles = {"name": "tiles", "preprocessing": {"image_size": 8, "channels": 1, "fit": "center-crop"}}
    context = prepared("tiny", images=samples[0][:, :8, :8], tokenizer=tiles)
    with pytest.raises(UserError) as error:
        evaluated(context)
    assert str(error.value) == "images of 8 x 8 pixels are too small to evaluate: SSIM needs 11 or more"


def test_the_plugin_registers_without_torch():
    command = "import sys, smalti.eval.plugin as p; list(p.smalti_register()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
    assert registry().options("stage", "evaluate") is module.EvaluateOptions
