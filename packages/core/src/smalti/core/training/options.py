"""Options of training; imported by recipes, so without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from smalti.core.options import DiscriminatorOptions, FeaturesOptions, LossOptions, Options, Slot
from smalti.core.sampling_settings import SamplingSettings

Share = Annotated[float, Field(ge=0, le=1)]
Steps = Annotated[int, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
DISTANCES = ("rfid", "lpips")  # metrics whose low values are the good ones


class Optimization(Options):
    """How a model is trained.

    Args:
        steps: updates of the weights.
        batch_size: images of one update over all processes and micro-batches.
        accumulate: micro-batches of one update.
        optimizer: `adamw`, or `adam`, whose weight decay is a part of the gradient.
        learning_rate: after warm-up.
        betas: of the optimizer.
        weight_decay: of the optimizer, on weights of two axes or more.
        final_weight_decay: the weight decay moves there along half a cosine over all steps; None leaves it.
        no_decay: parameters with one of these in their names have no weight decay either.
        decay_vectors: weights of one axis (biases, norms) have it, too.
        warmup_steps: linear, from `warmup_from` on.
        warmup_from: ratio to the learning rate at the first update; None is 1 / warmup_steps.
        schedule: after warm-up: `constant`; half a cosine down to `final_ratio`; `linear` or `exponential` through the
            `knots`, down to `final_ratio`; `steps`, from knot to knot at once.
        final_ratio: to the learning rate, at the last update.
        knots: points on the way, ascending: the share of the scheduled updates and the ratio there, e.g.
            `[[0.15, 1.0]]` holds the learning rate for 15 % of them.
        schedule_under_warmup: the schedule begins at the first update, hidden by the warm-up as long as that takes
            (timm), instead of after it.
        clip: largest norm of the gradient; None for no limit.
        ema_decay: of the averaged weights; None for none.
        ema_warmup: what the decay is after n updates, if that is less: `ramp`, (1 + n) / (10 + n); `power`,
            1 - (1 + n)^(-2/3); `none`, `ema_decay` from the first on.
        precision: of the forward pass; weights stay float32. With `float16` losses are scaled, so that small gradients
            do not become 0.
        max_skipped: updates in a row that are skipped because a loss or a gradient is not finite, before training
            gives up.
        compile: the models, by `torch.compile`.
        checkpoint_activations: blocks keep only their input and compute the rest again in the backward pass.
        sharding: `full` divides the weights of the first model (not of a discriminator), their gradients, averages and
            optimizer states over the processes (FSDP2); `none` keeps all of them on each.
        checkpoint_every: updates between checkpoints of everything that is needed to go on.
        log_every: updates between lines of `metrics.jsonl`.
        trackers: told the same lines, and pictures: `tensorboard`, `wandb`, `trackio`.
    """

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)] = 1
    optimizer: Literal["adamw", "adam"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    final_weight_decay: Annotated[float, Field(ge=0)] | None = None
    no_decay: tuple[str, ...] = ()
    decay_vectors: bool = False
    warmup_steps: Steps = 0
    warmup_from: Share | None = None
    schedule: Literal["constant", "cosine", "linear", "exponential", "steps"] = "cosine"
    final_ratio: Share = 0.0
    knots: tuple[tuple[Share, Annotated[float, Field(ge=0)]], ...] = ()
    schedule_under_warmup: bool = False
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    ema_warmup: Literal["none", "ramp", "power"] = "ramp"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    max_skipped: Steps = 20
    compile: bool = False
    checkpoint_activations: bool = False
    sharding: Literal["none", "full"] = "none"
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    log_every: Annotated[int, Field(ge=1)] = 50
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()

    @model_validator(mode="after")
    def _possible_schedule(self) -> Self:
        places = [place for place, _ in self.knots]
        if places != sorted(set(places)):
            raise ValueError(f"knots must ascend, got shares {', '.join(map(str, places))}")
        if self.knots and self.schedule in ("constant", "cosine"):
            raise ValueError(f"knots belong to the schedules linear, exponential and steps, not to {self.schedule}")
        if self.schedule == "steps" and not self.knots:
            raise ValueError("the schedule steps needs knots, e.g. [[0.8, 0.1]]")
        if self.schedule == "exponential" and min([self.final_ratio, *(ratio for _, ratio in self.knots)]) <= 0:
            raise ValueError("the schedule exponential needs a final_ratio and knots above 0")
        return self

    @model_validator(mode="after")
    def _possible_sharding(self) -> Self:
        if self.sharding == "full" and self.precision == "float16":
            raise ValueError("sharding: full goes with the precisions float32 and bfloat16, not with float16")
        return self


class LeCam(Options):
    """LeCam regularisation of the discriminator (Tseng et al. 2021): logits stay near the other kind's average.

    Args:
        weight: of the term.
        decay: of the running averages of real and generated logits.
        of: what is compared with them: `patches`, every logit (SEED-Voken, XQ-GAN), or the batch's `mean`
            (visual-tokenizer-pytorch, TiTok).
        update: the averages, `before` or `after` they are used.
    """

    weight: Annotated[float, Field(gt=0)] = 1e-3
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    of: Literal["patches", "mean"] = "mean"
    update: Literal["before", "after"] = "after"


class Augmentation(Options):
    """What happens to all images before the discriminator sees them.

    Args:
        probability: of each of DiffAugment's transformations (Zhao et al. 2020): translation, colour and cutout.
        blur_until: update up to which images are blurred most (as StyleGAN-T does).
        blur_fade: in so many updates after that the blur fades.
    """

    probability: Share = 1.0
    blur_until: Steps = 0
    blur_fade: Steps = 0


class Adversarial(Options):
    """The adversarial term of tokenizer training.

    Args:
        discriminator: the network.
        weight: of the generator's term.
        start: update at which the generator's term sets in.
        discriminator_start: update at which the discriminator begins to train; its schedule begins there.
        learning_rate: of the discriminator.
        weight_decay: of the discriminator; None takes the tokenizer's.
        warmup_steps: of the discriminator's learning rate; None takes the tokenizer's.
        warmup_from: as its ratio at the first update; None takes the tokenizer's.
        final_ratio: as its ratio at the last update; None takes the tokenizer's.
        objective: of the discriminator: `hinge` (Lim and Ye 2017) or `vanilla`, the log loss of the original GAN.
        generator_objective: `hinge`, the mean logit, also the partner of `vanilla` in taming; `non-saturating`,
            -log sigmoid of the logits (Goodfellow et al. 2014).
        image_logits: logits are averaged over each image before the objectives of: the `generator` (SEED-Voken), both
            (`all`), or `none`.
        discriminator_weight: of the discriminator's own loss; matters for clipping only.
        discriminator_first: the discriminator steps before the tokenizer (IBQ) instead of after it.
        adaptive: the generator's weight is multiplied by the ratio of the gradients of the recipe's losses and of the
            adversarial term at the decoder's last layer (VQGAN, equation 7).
        adaptive_limit: of that ratio.
        lecam: LeCam regularisation of the discriminator.
        r1: weight of half the squared gradient of the logits at real images (Mescheder et al. 2018).
        augment: what the discriminator sees.
    """

    discriminator: Annotated[DiscriminatorOptions, Slot("discriminator")]
    weight: Annotated[float, Field(gt=0)] = 0.1
    start: Steps = 0
    discriminator_start: Steps = 0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup_steps: Steps | None = None
    warmup_from: Share | None = None
    final_ratio: Share | None = None
    objective: Literal["hinge", "vanilla"] = "hinge"
    generator_objective: Literal["hinge", "non-saturating"] = "hinge"
    image_logits: Literal["none", "generator", "all"] = "none"
    discriminator_weight: Annotated[float, Field(gt=0)] = 1.0
    discriminator_first: bool = False
    adaptive: bool = False
    adaptive_limit: Annotated[float, Field(gt=0)] = 1e4
    lecam: LeCam | None = None
    r1: Annotated[float, Field(gt=0)] | None = None
    augment: Augmentation | None = None


class Ramp(Options):
    """A factor that moves in a line over the first updates and then stays.

    Args:
        start: at the first update.
        end: from update `steps` on.
        steps: see `end`.
    """

    start: Annotated[float, Field(ge=0)] = 1.0
    end: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=1)]

    def __call__(self, step: int) -> float:
        """The factor at an update."""
        return self.start + min(step / self.steps, 1.0) * (self.end - self.start)


class Perturbation(Options):
    """Latent perturbation (RobustTok, Qiu et al. 2025): in training some tokens become a near code, not the nearest.

    Args:
        neighbours: delta, how many of the nearest codes are drawn from, the nearest one among them.
        probability: alpha, that a token is drawn anew.
        share: beta, of the samples of a batch, its first, that are perturbed.
        anneal_from: update from which `neighbours` and `probability` shrink in a line.
        anneal_to: update at which they have shrunk.
        final_ratio: to what share of them.
    """

    neighbours: Annotated[int, Field(ge=1)] = 100
    probability: Share = 1.0
    share: Share = 0.1
    anneal_from: Steps = 0
    anneal_to: Steps = 0
    final_ratio: Share = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.anneal_to < self.anneal_from:
            raise ValueError(f"anneal_to must not be before anneal_from, got {self.anneal_to} and {self.anneal_from}")
        return self


class Best(Options):
    """Which validation is the best.

    Args:
        metric: a name of the validation's findings, e.g. `psnr` or `rfid`.
        prefer: its `higher` or its `lower` values.
    """

    metric: str = "psnr"
    prefer: Literal["higher", "lower"] = "higher"

    @model_validator(mode="after")
    def _right_way_round(self) -> Self:
        if self.metric in DISTANCES and self.prefer == "higher":
            raise ValueError(f"{self.metric} is a distance, of which the best is the lowest: give prefer: lower")
        return self


class Validation(Options):
    """A look at held-out images in the midst of training, with the weights as they are and with the averaged ones.

    Args:
        every: updates from one to the next.
        images: so many, the first of the recipe's `data.validation`.
        batch_size: images reconstructed at once.
        pictures: so many of them are shown beside their reconstructions, in `images/` and by trackers; 0 for none.
        metrics: installed components of kind `metric`; empty takes those that need nothing but the images.
        features: for the Frechet distance between images and reconstructions, `rfid`; None leaves that out.
        best: the weights of the best validation are kept in `tokenizer-best/` or `autoencoder-best/`; None keeps none.
    """

    every: Annotated[int, Field(ge=1)] = 1000
    images: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    pictures: Annotated[int, Field(ge=0)] = 16
    metrics: tuple[str, ...] = ()
    features: Annotated[FeaturesOptions, Slot("features")] | None = None
    best: Best | None = Best()


class Start(Options):
    """Weights to begin with, of a whole model or of a part of it.

    Args:
        source: a run or a saved model (folder), a published file, or a name of the zoo.
        part: of the source, by dotted name, e.g. `decoder`; empty takes all of it.
        into: the part of the model in training that it becomes; empty is all that no other start fills.
    """

    source: str
    part: str = ""
    into: str = ""


class Text(Options):
    """What the decoder reads of a text beside the latent: the features of its tokens, `text`.

    Data bring a text with each image, or features of it made beforehand.

    Args:
        encoder: the frozen tower that makes features of texts: a folder or a hub repository with a CLIP of
            transformers; None where the data bring features.
        of_class: the text of an image that has none, with `{}` in the place of its class's name; None refuses it.
    """

    encoder: str | None = None
    of_class: str | None = None


class TokenizerTraining(Optimization):
    """How a tokenizer or an autoencoder is trained.

    Args:
        start: weights to begin with: a run or a saved model (folder), a published file, or a name of the zoo; several
            fill a part each, the others begin at random, as all do with None.
        freeze: modules and weights that are not trained, by dotted name, e.g. `encoder`; such a module stays in
            evaluation mode, so that a quantizer's codes stay what they are, and gives no losses.
        text: that the decoder reads beside the latent.
        losses: between what the tokenizer makes of images and the images.
        ramps: factors of the terms that the model itself gives (its quantizer's, or an autoencoder's divergence), by
            name, e.g. `{entropy: {end: 0.01, steps: 5000}}`.
        adversarial: the discriminator and its terms.
        perturbation: of the quantized latent.
        validation: in the midst of training.
    """

    start: str | tuple[Start, ...] | None = None
    freeze: tuple[str, ...] = ()
    text: Text | None = None
    losses: Annotated[tuple[Annotated[LossOptions, Slot("loss")], ...], Field(min_length=1)]
    ramps: dict[str, Ramp] = Field(default_factory=dict)
    adversarial: Adversarial | None = None
    perturbation: Perturbation | None = None
    validation: Validation | None = None


class GeneratorValidation(Options):
    """A look at held-out images in the midst of training, with the weights as they are and with the averaged ones.

    Args:
        every: updates from one to the next.
        images: so many, the first of the recipe's `data.validation`, whose losses are measured.
        batch_size: of them at once.
        pictures: so many samples are shown, in `drawn/` and by trackers; sample i is of class i modulo the number of
            classes; 0 for none.
        sampling: of these samples.
    """

    every: Annotated[int, Field(ge=1)] = 5000
    images: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] = 32
    pictures: Annotated[int, Field(ge=0)] = 10
    sampling: SamplingSettings = SamplingSettings()


class GeneratorTraining(Optimization):
    """How a generator is trained; its loss is its own.

    Args:
        validation: in the midst of training.
    """

    validation: GeneratorValidation | None = None
