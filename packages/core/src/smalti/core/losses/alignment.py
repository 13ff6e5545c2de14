"""Alignment of a tokenizer's latent with the features of a frozen teacher (DINOv2, CLIP).

Legend: B batch, N latent positions, d width of the aligned branch, T width of the teacher.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.feature_prediction import FeatureHead, FeatureHeadOptions
from smalti.core.losses.branches import Branches, branch_latent, branch_width
from smalti.core.losses.contrastive import contrastive, gathered
from smalti.core.losses.loss import Loss, Model, Reconstruction
from smalti.core.losses.teacher import TeacherOptions
from smalti.core.options import LossOptions


class AlignmentOptions(LossOptions):
    """Options of `Alignment`.

    XQ-GAN's semantic loss has `projection: tokenizer` and else the defaults; FQGAN's has `student: head`,
    `projection: none`, `objective: contrastive-one-way` and `all_processes: false`.

    Args:
        teacher: the frozen network.
        branches: the latent's channels are cut into so many equal branches, of which one is aligned.
        branch: which, from 0; negative ones from the end.
        student: what of the branch is compared: `mean`, its mean over positions; `positions`, every position with the
            teacher's patch there; `head`, what a small trained transformer reads from it (FQGAN).
        projection: what makes the widths equal: `tokenizer`, the teacher's features pass the tokenizer's own projection
            to codes (XQ-GAN); `linear`, a trained one takes the student's to the teacher's width; `none`.
        objective: `contrastive`, over the pairs of a batch in both directions; `contrastive-one-way`, only from the
            student's side; `cosine`, one minus the mean cosine of the pairs.
        normalise: vectors to unit length before their inner products (XQ-GAN's clip_norm); the cosine always does.
        scale: of the inner products.
        final_scale: the scale moves there in a line, null leaves it.
        scale_steps: in so many updates.
        all_processes: negatives come from the batches of all processes, not only from the own one.
        leave_out: the share of a batch, its first samples, that is not aligned: those that quantizer dropout touches.
    """

    name: Literal["alignment"] = "alignment"
    teacher: TeacherOptions
    branches: Branches = 1
    branch: int = -1
    student: Literal["mean", "positions", "head"] = "mean"
    projection: Literal["tokenizer", "linear", "none"] = "linear"
    objective: Literal["contrastive", "contrastive-one-way", "cosine"] = "contrastive"
    normalise: bool = True
    scale: Annotated[float, Field(gt=0)] = 1.0
    final_scale: Annotated[float, Field(gt=0)] | None = None
    scale_steps: Annotated[int, Field(ge=1)] = 1
    all_processes: bool = True
    leave_out: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not -self.branches <= self.branch < self.branches:
            raise UserError(f"branch {self.branch} is not one of {self.branches} branches")
        if self.student == "head" and self.projection != "none":
            raise UserError("the head ends in the teacher's width: it needs projection: none")
        if self.student == "positions" and (self.objective != "cosine" or self.teacher.feature != "patches"):
            raise UserError("student: positions needs objective: cosine and a teacher with feature: patches")
        return self

    def build(self) -> Alignment:
        """Build it.

        Raises:
            UserError: the teacher's weights cannot be had.
        """
        return Alignment(self)


class Alignment(Loss):
    """How far the features of a branch of the latent are from a teacher's features of the image.

    The latent is that after quantization, with the quantizer's gradient, so that the codes of this branch come to
    carry what the teacher sees.
    """

    def __init__(self, options: AlignmentOptions) -> None:
        super().__init__()
        self.options = options
        self.teacher = options.teacher.build()
        self.student: nn.Module = nn.Identity()
        self._shared: tuple[nn.Module, ...] = ()

    def attach(self, model: Model) -> None:
        """Find the widths; make the student's head or projection.

        Raises:
            UserError: widths that do not meet; a tokenizer without a projection to codes.
        """
        options, teacher = self.options, self.teacher.width
        width = branch_width(model, options.branches)
        assert isinstance(model, Tokenizer), "nothing else has a quantizer"
        if options.student == "head":
            head = FeatureHeadOptions(first=0, channels=width, width=teacher)
            self.student = FeatureHead(head, math.prod(model.layout().shape[-1]))
        elif options.projection == "linear":
            self.student = nn.Linear(width, teacher)
        elif options.projection == "tokenizer":
            self._shared = (_projection_to_codes(model, teacher, width),)
        elif width != teacher:
            raise UserError(f"alignment: the branch has width {width} and the teacher {teacher}; choose a projection")

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The loss of the branch's features with the teacher's."""
        first = int(len(images) * self.options.leave_out)
        latent = branch_latent(output, self.options.branches, self.options.branch)[first:]
        return self.compare(self.predicted(latent), self.wanted(images[first:]), step)

    def predicted(self, latent: Tensor) -> Tensor:
        """A branch `(B, *space, d)` as features `(B, 1, T or d)`, or `(B, N, T or d)` of positions."""
        latent = latent.flatten(1, -2)
        if self.options.student == "mean":
            latent = latent.mean(1, keepdim=True)
        features: Tensor = self.student(latent)
        return features[:, :1] if self.options.student == "head" else features

    def wanted(self, images: Tensor) -> Tensor:
        """The teacher's features of images, `(B, 1, T or d)`, or `(B, N, T or d)` of positions."""
        features: Tensor = self.teacher(images)
        for projection in self._shared:
            features = projection(features)
        return features if self.options.student == "positions" else features.mean(1, keepdim=True)

    def compare(self, predicted: Tensor, wanted: Tensor, step: int) -> Tensor:
        """The objective for features `(B, N, T)`."""
        if predicted.shape != wanted.shape:
            raise UserError(
                f"alignment: the latent has {predicted.shape[1]} positions, the teacher {wanted.shape[1]} patches; "
                f"give the teacher an image_size of as many patches"
            )
        options = self.options
        if options.objective == "cosine":
            return 1.0 - F.cosine_similarity(predicted.float(), wanted.float(), dim=-1).mean()
        predicted, wanted = predicted.flatten(1), wanted.flatten(1)
        if options.normalise:
            predicted, wanted = F.normalize(predicted.float(), dim=-1), F.normalize(wanted.float(), dim=-1)
        if options.all_processes:
            predicted, wanted = gathered(predicted), gathered(wanted)
        return contrastive(predicted, wanted, self.scale(step), both_ways=options.objective == "contrastive")

    def scale(self, step: int) -> float:
        """The scale of the inner products at an update."""
        options = self.options
        if options.final_scale is None:
            return options.scale
        return options.scale + min(step / options.scale_steps, 1.0) * (options.final_scale - options.scale)


def _projection_to_codes(tokenizer: Tokenizer, inputs: int, outputs: int) -> nn.Module:
    """The linear map of the tokenizer that ends in its codes, for features of the same width as what it takes."""
    candidates = (getattr(getattr(tokenizer, "encoder", None), "to_code", None), getattr(tokenizer, "to_codes", None))
    for module in candidates:
        if isinstance(module, nn.Linear):
            if (module.in_features, module.out_features) == (inputs, outputs):
                return module
            raise UserError(
                f"alignment: the tokenizer projects {module.in_features} to {module.out_features} channels, but the "
                f"teacher has {inputs} and the branch {outputs}; take projection: linear"
            )
    raise UserError("alignment: this tokenizer has no projection to codes; take projection: linear")
