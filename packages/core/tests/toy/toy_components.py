"""What the toy plugin registers."""

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from smalti.core.contracts import Generator, Quantized, Quantizer, check_labels, check_tokens
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.noise import uniform
from smalti.core.options import GeneratorOptions, QuantizerOptions, StageOptions
from smalti.core.stage import Stage


class SignsOptions(QuantizerOptions):
    name: Literal["signs"] = "signs"
    dim: Annotated[int, Field(ge=1, le=16)] = 4

    def build(self):
        return Signs(self)


class Signs(Quantizer):
    """Code k has the signs of k's bits."""

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.dim = options.dim
        self.vocab = (2**options.dim,)

    def forward(self, latent):
        if latent.shape[-1] != self.dim:
            raise UserError(f"a latent of width {self.dim} is needed, got {latent.shape[-1]}")
        bits = (latent > 0).flatten(1, -2)
        tokens = (bits * 2 ** torch.arange(self.dim)).sum(-1, keepdim=True)
        codes = self.decode(tokens, latent.shape[1:-1]).to(latent.dtype)
        if not self.training:
            return Quantized(codes, tokens, {})
        losses = {"commitment": 0.25 * (latent - codes).square().mean()}
        return Quantized(latent + (codes - latent).detach(), tokens, losses)

    def decode(self, tokens, space):
        check_tokens(tokens, self.vocab)
        bits = (tokens >> torch.arange(self.dim)) & 1
        return (2.0 * bits - 1).unflatten(1, tuple(space))


class TableOptions(GeneratorOptions):
    name: Literal["table"] = "table"

    def supports(self, layout):
        return None if layout.streams == 1 else f"it models one stream, not {layout.streams}"

    def build(self, layout, classes):
        return Table(self, layout, classes)


class Table(Generator):
    def __init__(self, options, layout, classes):
        super().__init__(options, layout, classes)
        self.logits = nn.Parameter(torch.zeros(classes, layout.positions, layout.vocab[0]))

    def loss(self, tokens, labels):
        check_labels(labels, self.classes)
        return {"cross_entropy": F.cross_entropy(self.logits[labels].flatten(0, 1), tokens.flatten())}

    def sample(self, labels, settings, indices=None):
        check_labels(labels, self.classes)
        indices = torch.arange(len(labels)) if indices is None else indices
        logits = self.logits[labels]
        if settings.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        noise = torch.stack([uniform(settings.seed, indices, step)[:, 0] for step in range(logits.shape[1])], 1)
        cumulative = (logits.double() / settings.temperature).softmax(-1).cumsum(-1)
        return (cumulative < noise[..., None]).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)


class CountOptions(StageOptions):
    name: Literal["evaluate"] = "evaluate"

    def build(self, context):
        return Count(context)


class Count(Stage):
    name = "evaluate"
    sections = ("evaluate",)
    after = ("sample",)
    outputs = ("summary.json",)

    def run(self):
        run = self.context.run
        samples = np.load(run / "samples" / "samples.npz")
        seconds = sum(stage.get("seconds", 0) for stage in run.stages().values())
        write_json(run / "summary.json", {"samples": len(samples["arr_0"]), "seconds": seconds})
