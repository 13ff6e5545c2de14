"""Stage `evaluate`: reconstructions and samples against held-out images.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from smalti.core import distributed
from smalti.core.contracts import Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import IndexedBatch, TrainBatches, read_images
from smalti.core.errors import UserError
from smalti.core.files import write_json, write_text
from smalti.core.noise import mixed_seed
from smalti.core.options import StageOptions
from smalti.core.recipe import dump_recipe
from smalti.core.stage import Context, Stage
from smalti.core.training.loop import micro_batch, train
from smalti.core.weights import fingerprint
from smalti.eval.classifier import Architecture, Classifier
from smalti.eval.classifier_training import NAME as CLASSIFIER
from smalti.eval.classifier_training import ClassifierTask, ClassifierTraining
from smalti.eval.figures import Figure, library_versions
from smalti.eval.judged import Judged, judge, measure_samples
from smalti.eval.pairwise import SSIM_WINDOW
from smalti.eval.reconstructions import Reconstructions, measure_reconstructions
from smalti.eval.report import ClassRow, Report, render
from smalti.eval.same_classes import SameClasses
from smalti.eval.sample_archive import SampleArchive

NOTE = (
    "The features are those of a small classifier that this run trained on its own training images. Distances, "
    "precision and recall in them compare runs with the same data, classifier and counts; they are not FID and "
    "must not be set beside figures in Inception features."
)


class EvaluateOptions(StageOptions):
    """What is measured, and how much of it the report shows.

    Args:
        classifier: the network whose features and decisions judge the samples, and how it is trained.
        neighbours: k of precision and recall.
        batch_size: images taken at once.
        shown_reconstructions: held-out images in the report.
        shown_classes: rows of samples in the report.
        shown_samples: samples of a class in the report.
    """

    name: Literal["evaluate"] = "evaluate"
    classifier: ClassifierTraining = ClassifierTraining()
    neighbours: Annotated[int, Field(ge=1)] = 3
    batch_size: Annotated[int, Field(ge=1)] = 100
    shown_reconstructions: Annotated[int, Field(ge=1)] = 16
    shown_classes: Annotated[int, Field(ge=1)] = 20
    shown_samples: Annotated[int, Field(ge=1)] = 12

    def build(self, context: Context) -> Evaluate:
        """Build the stage for one run."""
        return Evaluate(context, self)


class Evaluate(Stage):
    """Writes `evaluation/` (the classifier and `results.json`), `summary.json` and `report.html`.

    All processes train the classifier; the first one measures.
    """

    name = "evaluate"
    sections = ("seed", "data", "evaluate")
    after = ("train-tokenizer", "train-generator", "sample")
    outputs = ("evaluation", f"state/{CLASSIFIER}.pt", "summary.json", "report.html")

    def __init__(self, context: Context, options: EvaluateOptions) -> None:
        super().__init__(context)
        self.options = options

    def run(self) -> None:
        """Check what is there, train the classifier from where it was, then measure."""
        started = time.monotonic()
        context = self.context
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer").to(context.device)
        validation = context.recipe.data.validation.build()
        if len(validation.classes) < 2:
            raise UserError(
                f"{validation.name} has {len(validation.classes)} classes, the classifier that judges samples needs 2 "
                "or more: leave evaluation out with evaluate=null"
            )
        samples = SampleArchive(context.run / "samples" / "samples.npz", len(validation.classes))
        size = tokenizer.preprocessing.image_size
        if size < SSIM_WINDOW:
            raise UserError(
                f"images of {size} x {size} pixels are too small to evaluate: SSIM needs {SSIM_WINDOW} or more"
            )
        if samples.shape[1:3] != (size, size):
            raise UserError(
                f"{samples.path} holds images of {samples.shape[1]} x {samples.shape[2]} pixels, the tokenizer's "
                f"are {size} x {size}: run `smalti sample` again"
            )
        classifier = self._classifier(tokenizer, len(validation.classes)).to(context.device)
        if distributed.rank() == 0:
            with torch.inference_mode():
                self._measure(tokenizer, classifier, validation, samples, started)

    def _classifier(self, tokenizer: Tokenizer, classes: int) -> Classifier:
        """The classifier, trained on the recipe's training images."""
        context, options = self.context, self.options.classifier
        training = context.recipe.data.train.build()
        if len(training.classes) != classes:
            raise UserError(
                f"{training.name} has {len(training.classes)} classes to train on, the validation images {classes}"
            )
        torch.manual_seed(mixed_seed(context.recipe.seed, CLASSIFIER, "weights"))
        size = tokenizer.preprocessing.image_size
        classifier = Classifier(
            Architecture(classes=classes, image_size=size, width=options.width, dropout=options.dropout)
        )
        batches = TrainBatches(
            training,
            tokenizer.preprocessing,
            micro_batch(options),
            seed=mixed_seed(context.recipe.seed, CLASSIFIER),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_undecodable=context.recipe.data.max_undecodable,
            warn=context.reporter.say,
        )
        averaged = train(ClassifierTask(classifier, options), batches, options, stage=CLASSIFIER, context=context)
        if averaged is not None:
            classifier.load_state_dict(averaged)
        if distributed.rank() == 0:
            classifier.save_pretrained(context.run / "evaluation" / CLASSIFIER)
        return classifier.eval()

    def _measure(
        self,
        tokenizer: Tokenizer,
        classifier: Classifier,
        validation: ImageDataset,
        samples: SampleArchive,
        started: float,
    ) -> None:
        device, seed = self.context.device, self.context.recipe.seed
        extractor = f"classifier trained by this run on its training images, fingerprint {classifier.fingerprint}"
        images = 3 * len(validation) + len(samples)
        with self.context.reporter.progress(self.name, images, unit="image") as advance:
            held_out = (batch.images.to(device) for batch in self._read(tokenizer, validation))
            shown = self.options.shown_reconstructions
            spread = {index * len(validation) // shown for index in range(shown)}  # data may lie sorted by class
            reconstructed = measure_reconstructions(tokenizer, held_out, spread, advance)
            real = judge(classifier, self._pixels(tokenizer, validation), "validation images", device, advance)
            alike = SameClasses(
                self.context.recipe.data.train.build(), real.labels, mixed_seed(seed, self.name, "training images")
            )
            training = judge(classifier, self._pixels(tokenizer, alike), "training images", device, advance)
            archive = samples.batches(self.options.batch_size)
            drawn = judge(classifier, archive, "samples", device, advance)
        figures = reconstructed.figures + measure_samples(drawn, real, training, self.options.neighbours, extractor)
        rows = [
            ClassRow(name, *_counted(drawn.of_class(label)), *_counted(real.of_class(label)))
            for label, name in enumerate(validation.classes)
        ]
        self._write(figures, rows, reconstructed, samples, self._protocol(tokenizer, classifier), started)

    def _read(self, tokenizer: Tokenizer, dataset: ImageDataset) -> Iterator[IndexedBatch]:
        return read_images(
            dataset,
            tokenizer.preprocessing,
            self.options.batch_size,
            max_undecodable=self.context.recipe.data.max_undecodable,
            warn=self.context.reporter.say,
        )

    def _pixels(self, tokenizer: Tokenizer, dataset: ImageDataset) -> Iterator[tuple[Tensor, Tensor]]:
        return ((to_uint8(batch.images), batch.labels) for batch in self._read(tokenizer, dataset))

    def _protocol(self, tokenizer: Tokenizer, classifier: Classifier) -> dict[str, Any]:
        """What all figures share."""
        data = self.context.recipe.data
        return {
            "note": NOTE,
            "seed": self.context.recipe.seed,
            "training_images": data.train.model_dump(mode="json"),
            "validation_images": data.validation.model_dump(mode="json"),
            "reference": "validation images: the classifier was fitted to the training images, so that their features "
            "are not like those of any new image",
            "preprocessing": tokenizer.preprocessing.model_dump(mode="json"),
            "tokenizer": fingerprint(tokenizer, tokenizer.config()),
            "classifier": {"fingerprint": classifier.fingerprint, **self.options.classifier.model_dump(mode="json")},
            "features": "pool: the classifier's last feature maps, averaged over positions, float32",
            "libraries": library_versions(),
        }

    def _write(
        self,
        figures: list[Figure],
        rows: list[ClassRow],
        reconstructed: Reconstructions,
        samples: SampleArchive,
        protocol: dict[str, Any],
        started: float,
    ) -> None:
        run, recipe = self.context.run, self.context.recipe
        stages = run.stages()
        earlier = sum(known.get("seconds", 0.0) for name, known in stages.items() if name != self.name)
        seconds = round(earlier + time.monotonic() - started, 1)
        results = {
            "protocol": protocol,
            "figures": {figure.name: figure.model_dump(mode="json", exclude={"name", "title"}) for figure in figures},
            "classes": [row._asdict() for row in rows],
        }
        write_json(run / "evaluation" / "results.json", results)
        shown = rows[: self.options.shown_classes]
        report = Report(
            recipe=recipe.name,
            summary=recipe.summary,
            note=NOTE,
            figures={figure.name: figure for figure in figures},
            seconds=seconds,
            curves={
                stage: lines
                for stage in ("train-tokenizer", "train-generator", CLASSIFIER)
                if (lines := run.metrics(stage))
            },
            pairs=[(original.numpy(), copy.numpy()) for original, copy in reconstructed.pairs],
            code_counts=[counts.numpy() for counts in reconstructed.code_counts],
            rows=shown,
            samples=_first_of_each(samples, len(shown), self.options.shown_samples),
            protocol=protocol,
            resolved_recipe=dump_recipe(recipe),
        )
        write_text(run / "report.html", render(report))
        write_json(run / "summary.json", {**{figure.name: figure.value for figure in figures}, "seconds": seconds})


def _counted(judged: Judged) -> tuple[int, float | None]:
    """How many images, and the share with the right decision, None of none."""
    count = len(judged.labels)
    return count, judged.agreement if count else None


def _first_of_each(samples: SampleArchive, classes: int, count: int) -> list[list[np.ndarray[Any, Any]]]:
    """The first `count` samples, uint8 `(H, W, 3)`, of each of the first classes."""
    found: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(classes)]
    for images, labels in samples.batches(64):
        for image, label in zip(images, labels.tolist(), strict=True):
            if label < classes and len(found[label]) < count:
                found[label].append(image.numpy())
        if all(len(images) == count for images in found):
            break
    return found
