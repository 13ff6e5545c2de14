"""Options of components: frozen pydantic models that know how to build what they describe.

A component is chosen in YAML by name, `{name: fsq, levels: [8, 5, 5]}`. A model that contains a component
declares the field as `Annotated[QuantizerOptions, Slot("quantizer")]`: the slot looks the name up in the
plugin registry and validates the rest with the options class found there, so that an error carries the
whole dotted path.
"""

from __future__ import annotations

import reprlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema

from smalti.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from smalti.core.autoencoder import Autoencoder
    from smalti.core.contracts import Decoder, Encoder, Features, Generator, PairMetric, Quantizer, Tokenizer
    from smalti.core.data.dataset import ImageDataset
    from smalti.core.layout import TokenLayout
    from smalti.core.losses.loss import Loss
    from smalti.core.stage import Context, Stage


MOST_TOLD = 8  # problems of one file


class Options(BaseModel):
    """Base of all options: immutable, unknown keys are errors.

    A component's options add `name: Literal["fsq"] = "fsq"`, the name it is registered under, and `build()`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ComponentOptions(Options):
    """Options of something that is registered; subclasses narrow `name` to their own."""

    name: str


class Slot:
    """Annotation of a field that holds the options of a component of one kind, chosen by its name.

    Args:
        kind: the component kind, e.g. `"quantizer"`.
        name: the name taken where the value gives none.
    """

    def __init__(self, kind: str, name: str | None = None) -> None:
        self.kind = kind
        self.name = name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate through the registry; serialise as the chosen options class does."""
        return core_schema.no_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda options: options.model_dump(mode="json")
            ),
        )

    def _validate(self, value: object) -> ComponentOptions:
        from smalti.core.plugins import registry

        if isinstance(value, ComponentOptions):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("component", "expected {name: ..., options}, got {got}", {"got": _shown(value)})
        name = value.get("name", self.name)
        if not isinstance(name, str):
            raise PydanticCustomError(
                "component",
                "a {kind} needs a name; installed: {names}",
                {"kind": self.kind, "names": ", ".join(registry().names(self.kind)) or "none"},
            )
        try:
            options = registry().options(self.kind, name)
        except UserError as error:
            raise PydanticCustomError("component", "{sentence}", {"sentence": str(error)}) from None
        validated: ComponentOptions = options.model_validate({**value, "name": name})
        return validated


def sentences(error: ValidationError, prefix: str = "") -> str:
    """A validation error as one line: `tokenizer.quantizer.level: Extra inputs are not permitted; ...`."""
    parts = []
    for line in error.errors(include_url=False):
        path = ".".join(str(part) for part in (prefix, *line["loc"]) if part != "")
        got = "" if line["type"] in ("extra_forbidden", "missing", "component") else f", got {_shown(line['input'])}"
        message = "no such option" if line["type"] == "extra_forbidden" else line["msg"].removeprefix("Value error, ")
        parts.append(f"{path}: {message}{got}" if path else f"{message}{got}")
    return "; ".join(parts[:MOST_TOLD]) + (f"; and {len(parts) - MOST_TOLD} more" if len(parts) > MOST_TOLD else "")


def _shown(value: object) -> str:
    """A value for a sentence: a stranger's may be large, or refer to itself."""
    shortened = reprlib.Repr()
    shortened.maxlevel, shortened.maxstring, shortened.maxother = 2, 80, 80
    return shortened.repr(value)


class Preprocessing(Options):
    """How an image file becomes a tensor of the size that a tokenizer takes; it travels with the tokenizer.

    Args:
        image_size: side of the square output in pixels.
        channels: 3 for RGB, 1 for grey.
        fit: `pad` keeps the pixels and adds a border of `background`; `center-crop` is ADM's: halve with a
            box filter while the short side is at least twice the target, resize it bicubic, cut the centre;
            `bicubic-crop` and `bilinear-crop` resize the short side in one go and cut the centre, as
            torchvision does; `native-crop` cuts the centre without resizing, and pads where the image is smaller.
        background: grey level of the border, 0 to 255.
    """

    image_size: Annotated[int, Field(ge=1)]
    channels: Literal[1, 3] = 3
    fit: Literal["pad", "center-crop", "bicubic-crop", "bilinear-crop", "native-crop"] = "center-crop"
    background: Annotated[int, Field(ge=0, le=255)] = 0


class EncoderOptions(ComponentOptions):
    """Options of an encoder."""

    @abstractmethod
    def build(self, channels: int) -> Encoder:
        """Build it for images of `channels` channels."""


class DecoderOptions(ComponentOptions):
    """Options of a decoder."""

    @abstractmethod
    def build(self, channels: int) -> Decoder:
        """Build it for images of `channels` channels."""


class QuantizerOptions(ComponentOptions):
    """Options of a quantizer."""

    @abstractmethod
    def build(self) -> Quantizer:
        """Build it."""


class TokenizerOptions(ComponentOptions):
    """Options of a tokenizer.

    Args:
        preprocessing: how image files become what it takes.
    """

    preprocessing: Preprocessing

    @abstractmethod
    def build(self) -> Tokenizer:
        """Build it."""


class AutoencoderOptions(ComponentOptions):
    """Options of an autoencoder.

    Args:
        preprocessing: how image files become what it takes.
    """

    preprocessing: Preprocessing

    @abstractmethod
    def build(self) -> Autoencoder:
        """Build it."""


class GeneratorOptions(ComponentOptions):
    """Options of a generator; which tokens and how many classes it gets to know when it is built."""

    @abstractmethod
    def supports(self, layout: TokenLayout) -> str | None:
        """None if a generator with these options takes `layout`, else the reason why not, as a sentence."""

    @abstractmethod
    def build(self, layout: TokenLayout, classes: int) -> Generator:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""


class DatasetOptions(ComponentOptions):
    """Options of a set of labelled images."""

    @abstractmethod
    def build(self) -> ImageDataset:
        """Open it."""


class LossOptions(ComponentOptions):
    """Options of a loss of tokenizer training.

    Args:
        weight: multiplies the value in the objective.
    """

    weight: float = 1.0

    @abstractmethod
    def build(self) -> Loss:
        """Build it."""


class DiscriminatorOptions(ComponentOptions):
    """Options of a discriminator, a module from images to logits."""

    @abstractmethod
    def build(self, channels: int) -> nn.Module:
        """Build it for images of `channels` channels."""


class FeaturesOptions(ComponentOptions):
    """Options of a feature extractor."""

    @abstractmethod
    def build(self) -> Features:
        """Build it."""


class MetricOptions(ComponentOptions):
    """Options of a metric between images and their references.

    Attributes:
        routine: it is computed where no metrics are named; it then needs nothing but the images.
    """

    routine: ClassVar[bool] = True

    @abstractmethod
    def build(self) -> PairMetric:
        """Build it."""


class StageOptions(ComponentOptions):
    """Options of a pipeline stage that a plugin brings."""

    @abstractmethod
    def build(self, context: Context) -> Stage:
        """Build the stage for one run."""
