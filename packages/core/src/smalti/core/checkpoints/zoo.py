"""The zoo: what is published, where, and what its publishers say of it. Nothing here imports torch.

A table is a YAML file of one system, in the folder of a module that a plugin registers under the kind `zoo`:

    defaults: {system: LlamaGen, home: "https://...", licence: {code: MIT}}    # of every model of the table
    protocols: {rfid: "ImageNet validation, ..."}                              # what the figures' `protocol` stands for
    models:
      - {name: llamagen-vq-ds16, kind: tokenizer, layout: llamagen, file: vq_ds16_c2i.pt, ...}
"""

from __future__ import annotations

import difflib
import shlex
import socket
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlparse
from urllib.request import getproxies

from pydantic import Field, ValidationError

from smalti.core.errors import UserError
from smalti.core.files import parse_yaml
from smalti.core.layout import TokenLayout
from smalti.core.options import Options, sentences
from smalti.core.plugins import registry

HUB = "https://huggingface.co"
UNKNOWN = "not stated"


class Licence(Options):
    """Licences as the publisher states them."""

    code: str = UNKNOWN
    weights: str = UNKNOWN


class PublishedFigure(Options):
    """A number that the publisher gives.

    Args:
        name: e.g. `rFID`, `PSNR`.
        value: as printed there.
        protocol: how it was measured; in a table, a key of its `protocols`.
    """

    name: str
    value: float
    protocol: str


class ZooModel(Options):
    """A model that somebody describes, and mostly publishes. What is not known is None or empty.

    Args:
        name: what `smalti import` and `from_pretrained` call it.
        system: the system it belongs to.
        kind: what it becomes here.
        layout: of its file, a component of the kind `checkpoint`.
        published: whether its weights are published; None where that is not known.
        hub: the publisher's repository on the Hugging Face hub.
        file: path within that repository, or the name of the file.
        home: the publisher's page.
        paper: arXiv number.
        licence: of code and weights.
        data: what it was trained on.
        resolution: side of its images in pixels.
        tokens: their layout at that resolution.
        latents: positions and width of an autoencoder's latent, which has no tokens.
        parameters: as published, or counted in its file.
        tokenizer: name of the model whose tokens a generator draws.
        figures: published numbers.
        overrides: options that an import cannot infer from the file, by dotted path.
        note: what else one should know.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    system: str
    kind: Literal["tokenizer", "autoencoder", "generator"]
    layout: str
    published: bool | None = True
    hub: str | None = None
    file: str | None = None
    home: str
    paper: str | None = None
    licence: Licence = Licence()
    data: str | None = None
    resolution: Annotated[int, Field(ge=1)] | None = None
    tokens: TokenLayout | None = None
    latents: tuple[int, int] | None = None
    parameters: Annotated[int, Field(ge=1)] | None = None
    tokenizer: str | None = None
    figures: tuple[PublishedFigure, ...] = ()
    overrides: tuple[str, ...] = ()
    note: str = ""

    @property
    def url(self) -> str | None:
        """Where the file can be downloaded, if that is known."""
        return f"{HUB}/{self.hub}/resolve/main/{self.file}" if self.hub and self.file else None

    @property
    def status(self) -> str:
        """`importable`, or what is missing for that."""
        if self.published is False:
            return "not published"
        if not self.readable:
            return f"missing: layout {self.layout!r}"
        return "importable" if self.published else "importable, where you have the file"

    @property
    def readable(self) -> bool:
        """Whether the layout of its file is known here."""
        return self.layout in registry().names("checkpoint")

    @property
    def command(self) -> str:
        """How the downloaded file is imported."""
        file = Path(self.file).name if self.file else "FILE"
        changes = "".join(f" --set {shlex.quote(override)}" for override in self.overrides)
        return f"smalti import {file} --as {self.layout}{changes} --out {self.name}"


class _Table(Options):
    defaults: dict[str, Any] = Field(default_factory=dict)
    protocols: dict[str, str] = Field(default_factory=dict)
    models: list[dict[str, Any]]


@cache
def zoo() -> dict[str, ZooModel]:
    """All models by name, in the order of the tables.

    Raises:
        UserError: a table that cannot be read, or a name that two tables claim.
    """
    found: dict[str, ZooModel] = {}
    for name in registry().names("zoo"):
        for folder in registry().load("zoo", name).__path__:
            for path in sorted(Path(folder).glob("*.yaml")):
                for model in read_table(path):
                    if model.name in found:
                        raise UserError(f"the zoo has two models called {model.name!r}, one of them in {path}")
                    found[model.name] = model
    return found


def read_table(path: Path) -> list[ZooModel]:
    """The models of one YAML table.

    Raises:
        UserError: unreadable YAML, or an entry that is not one; says which.
    """
    try:
        content = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not readable YAML: {error}") from None
    try:
        table = _Table.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path} is not a zoo table: {sentences(error)}") from None
    return [_model(path, table, model) for model in table.models]


def _model(path: Path, table: _Table, content: dict[str, Any]) -> ZooModel:
    try:
        model = ZooModel.model_validate({**table.defaults, **content})
        figures = [figure.model_copy(update={"protocol": table.protocols[figure.protocol]}) for figure in model.figures]
    except ValidationError as error:
        raise UserError(f"{path}, model {content.get('name')!r}: {sentences(error)}") from None
    except KeyError as error:
        raise UserError(f"{path}, model {content.get('name')!r}: no protocol {error.args[0]!r} in the table") from None
    return model.model_copy(update={"figures": tuple(figures)})


def zoo_model(name: str) -> ZooModel:
    """The model of that name.

    Raises:
        UserError: there is none; says which name is near.
    """
    if name not in zoo():
        close = difflib.get_close_matches(name, zoo(), n=1)
        raise UserError(
            f"no model {name!r} in the zoo: `smalti zoo` lists its {len(zoo())} models"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return zoo()[name]


def fetch(model: ZooModel) -> Path:
    """The published file of a model: out of huggingface_hub's cache, or from the hub.

    Raises:
        UserError: it is not published, cannot be read, or could not be had; says what to download from where, and what
            to do then.
    """
    if model.published is False:
        raise UserError(
            f"the weights of {model.name} are not published; " + (model.note or f"see {model.home}").rstrip(".")
        )
    if not model.readable:
        raise UserError(
            f"{model.name} is listed, but cannot be imported: nothing that is installed reads its layout "
            f"{model.layout!r}"
        )
    if model.hub is None or model.file is None:
        raise UserError(
            f"{model.name} has no known address: download {model.file or 'its file'} from where {model.home} says, "
            f"then run `{model.command}`"
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(model.hub, model.file)
    if isinstance(cached, str):
        return Path(cached)
    try:
        _look_up_hub()
        return Path(hf_hub_download(model.hub, model.file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{model.name} could not be fetched ({type(error).__name__}): download {model.url}, "
            f"then run `{model.command}`"
        ) from None


def _look_up_hub() -> None:
    """Raise an `OSError` at once where the hub's name cannot be found; its client would try for half a minute."""
    from huggingface_hub.constants import ENDPOINT

    if not getproxies():  # a proxy looks names up itself
        socket.getaddrinfo(urlparse(ENDPOINT).hostname, None)
