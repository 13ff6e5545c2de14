"""Tokens in tar shards, and beside them `layout.json`, which tells all that their reader needs.

    tokens/layout.json           a `TokenManifest`
    tokens/tokens-000000.tar     for each sample `{key}.npy`, its tokens (V, L, S), and `{key}.cls`, its label

The tars are WebDataset shards. The same tokens give the same bytes.

Legend: N samples, V views of an image (itself, its mirror image), L positions, S streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smalti.core.data.array_file import Tokens, array_bytes, check_stored_tokens, parse_array
from smalti.core.data.listed import DIGITS
from smalti.core.data.tar_shards import read_shard, write_shard
from smalti.core.errors import UserError
from smalti.core.files import read_json, write_json
from smalti.core.layout import TokenLayout
from smalti.core.options import sentences

MANIFEST = "layout.json"


class ShardEntry(BaseModel):
    """One shard of a token set; `name` is that of a file beside `layout.json`, no path and no command."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    samples: Annotated[int, Field(ge=0)]


class TokenManifest(BaseModel):
    """What `layout.json` tells.

    Args:
        layout: of the tokens of one view.
        classes: names; labels are below their number.
        tokenizer: fingerprint of the tokenizer that made them.
        dataset: name of the images' dataset.
        samples: N.
        views: names of the V views, e.g. `("original", "flip")`.
        shards: in the order of samples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: TokenLayout
    classes: tuple[str, ...]
    tokenizer: str
    dataset: str
    samples: Annotated[int, Field(ge=0)]
    views: Annotated[tuple[str, ...], Field(min_length=1)]
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class TokenSet:
    """The tokens of a dataset, in memory.

    Attributes:
        folder: where they were read.
        tokens: `(N, V, L, S)`, of the smallest unsigned type that holds the vocabulary.
        labels: int64 `(N,)`, below the number of classes.
        layout: of the tokens of one view.
        classes: names.
        tokenizer: fingerprint of the tokenizer that made them.
        views: V names.
    """

    folder: Path
    tokens: Tokens
    labels: NDArray[np.int64]
    layout: TokenLayout
    classes: tuple[str, ...]
    tokenizer: str
    views: tuple[str, ...]

    def __len__(self) -> int:
        """N, the number of samples."""
        return len(self.labels)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Raise a `UserError` where another tokenizer made these tokens."""
        if fingerprint != self.tokenizer:
            raise UserError(
                f"the token shards in {self.folder} were made by another tokenizer "
                f"({self.tokenizer}, this one is {fingerprint}): run `smalti tokenize` again"
            )


def shard_name(number: int) -> str:
    """The file name of the shard with a number."""
    return f"tokens-{number:06d}.tar"


def write_token_shard(
    path: Path, keys: Sequence[str], tokens: Tokens, labels: Sequence[int] | NDArray[np.int64], layout: TokenLayout
) -> ShardEntry:
    """Write one shard, whole or not at all.

    Args:
        path: of the shard, see `shard_name`.
        keys: n names, written as `write_shard` does.
        tokens: `(n, V, L, S)`.
        labels: n.
        layout: of the tokens.

    Raises:
        UserError: tokens that do not fit the layout, two neighbours of one key, or a disk that is full.
    """
    assert len(keys) == len(tokens) == len(labels)
    check_stored_tokens(tokens, layout, f"the tokens for {path}")
    compact = tokens.astype(_type_for(layout))
    samples = (
        (key, {"npy": array_bytes(array), "cls": str(int(label)).encode()})
        for key, array, label in zip(keys, compact, labels, strict=True)
    )
    return ShardEntry(name=path.name, samples=write_shard(path, samples))


def write_manifest(folder: Path, manifest: TokenManifest) -> None:
    """Write `layout.json`; done last, it says that the shards are complete."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_token_shards(folder: str | Path) -> TokenSet:
    """Read a folder of token shards into memory and check every sample.

    Raises:
        UserError: no such folder or no `layout.json`; a shard that is missing, damaged, or holds other
            numbers of samples than told; a sample of another shape, or codes or labels out of range.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; expected a folder of token shards, as `smalti tokenize` writes it")
    path = folder / MANIFEST
    try:
        manifest = TokenManifest.model_validate(read_json(path, "the layout of token shards"))
    except ValidationError as error:
        raise UserError(f"{path} cannot be used: {sentences(error)}") from None
    told = sum(entry.samples for entry in manifest.shards)
    if told != manifest.samples:
        raise UserError(f"{path} is damaged: it tells of {manifest.samples} samples, its shards of {told}")
    shape = (told, len(manifest.views), manifest.layout.positions, manifest.layout.streams)
    try:
        tokens, labels = np.empty(shape, _type_for(manifest.layout)), np.empty(told, np.int64)
    except (MemoryError, ValueError):
        raise UserError(f"{path} tells of tokens {shape}, more than fit into memory") from None
    start = 0
    for entry in manifest.shards:
        part = slice(start, start + entry.samples)
        _fill(tokens[part], labels[part], folder / entry.name, manifest)
        start += entry.samples
    return TokenSet(folder, tokens, labels, manifest.layout, manifest.classes, manifest.tokenizer, manifest.views)


def _fill(tokens: Tokens, labels: NDArray[np.int64], path: Path, manifest: TokenManifest) -> None:
    """Read one shard of n samples into `tokens` `(n, V, L, S)` and `labels` `(n,)`."""
    count, samples = 0, len(labels)
    for count, sample in enumerate(_at_most(samples, path), start=1):
        where = f"sample {sample['__key__']!r} of shard {path}"
        array = _array(sample, where)
        if array.shape != tokens.shape[1:] or array.dtype != tokens.dtype:
            expected = f"{tokens.dtype} {tokens.shape[1:]}"
            raise UserError(f"{where} holds tokens {array.dtype} {array.shape}, {MANIFEST} asks for {expected}")
        check_stored_tokens(array[None], manifest.layout, f"the tokens of {where}")
        tokens[count - 1] = array
        labels[count - 1] = _label(sample, where, len(manifest.classes))
    if count < samples:
        raise UserError(f"shard {path} holds {count} samples, {MANIFEST} says {samples}")


def _at_most(samples: int, path: Path) -> Iterator[dict[str, Any]]:
    for count, sample in enumerate(read_shard(str(path)), start=1):
        if count > samples:
            raise UserError(f"shard {path} holds more samples than the {samples} that {MANIFEST} says")
        yield sample


def _array(sample: dict[str, Any], where: str) -> Tokens:
    if "npy" not in sample:
        raise UserError(f"{where} has no tokens: expected .npy")
    try:
        array: Tokens = parse_array(sample["npy"])
    except ValueError as error:
        raise UserError(f"{where} is damaged: {error}") from error
    return array


def _label(sample: dict[str, Any], where: str, classes: int) -> int:
    content = sample.get("cls", b"")
    if not (content.isdigit() and len(content) <= DIGITS and int(content) < classes):
        shown = content[:20].decode(errors="replace")
        raise UserError(f"{where} has the label {shown!r}: with {classes} classes, labels are 0 to {classes - 1}")
    return int(content)


def _type_for(layout: TokenLayout) -> np.dtype[np.unsignedinteger[Any]]:
    return np.min_scalar_type(max(layout.vocab) - 1)
