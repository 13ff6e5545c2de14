"""A published layout and a metric, which the toy plugin registers."""

from typing import Literal

from smalti.core.checkpoints.layout import CheckpointLayout
from smalti.core.checkpoints.rules import Rename
from smalti.core.contracts import PairMetric
from smalti.core.options import MetricOptions


class ToyLayout(CheckpointLayout):
    """The convolutional tokenizer of the tests, with other names, and the encoder's layers from the end."""

    name = "toy"
    ignored = ("steps_seen", "loss.*")
    container = "model"

    def recognises(self, shapes):
        return "toy.enc.4.weight" in shapes and shapes["pre.weight"][0] >= 1

    def config(self, shapes):
        width = shapes["toy.enc.4.weight"][0]
        channels = shapes["toy.dec.7.weight"][0] // 4
        networks = {"widths": [width, width], "blocks": 1, "groups": 2}
        return {
            "kind": "tokenizer",
            "options": {
                "name": "composed",
                "preprocessing": {"image_size": 8, "channels": channels, "fit": "center-crop"},
                "encoder": {"name": "cnn", **networks},
                "quantizer": {"name": "signs", "dim": shapes["pre.weight"][0]},
                "decoder": {"name": "cnn", **networks},
            },
        }

    def rules(self, config):
        return [
            Rename("toy.enc.{layer}.*", "encoder.layers.{layer}.*", reverse={"layer": 5}),
            Rename("toy.dec.{layer}.*", "decoder.layers.{layer}.*"),
            Rename("pre.*", "to_codes.*", pointwise=True),
            Rename("post.*", "from_codes.*", pointwise=True),
        ]


class DifferenceOptions(MetricOptions):
    name: Literal["difference"] = "difference"

    def build(self):
        return PairMetric("levels", "mean absolute difference", _difference)


def _difference(images, references):
    return (images.float() - references.float()).abs().flatten(1).mean(1)
