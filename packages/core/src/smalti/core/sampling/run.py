"""A run of samples: images of chosen classes, drawn in chunks by any number of processes, then put together.

    samples.npz                      ADM's layout: `arr_0` images uint8 (N, H, W, 3), `arr_1` labels
    grid.png                         a row per class
    images/CLASS/000012.png          where the options ask for files: sample 12
    chunks/                          while the run goes on: its batch size, and the images chunk by chunk

Sample i is of the classes in turn and draws the noise of number i. Chunk k holds the samples from k times the batch
size on, whichever process draws it, and the batch size is fixed for a run and its restarts: so every sample is
computed in the same company. Between runs of other batch sizes the noise is still the same, and only rounding in
matrix products can differ.

Legend: N images, H W pixels.
"""

from __future__ import annotations

import difflib
import re
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smalti.core import distributed
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.array_file import array_bytes
from smalti.core.data.images import VISIBLE_OF_MANY, enlargement, save_grid, to_uint8
from smalti.core.errors import UserError, few
from smalti.core.files import TEMPORARY, atomic_write, disk_errors, read_json, write_bytes, write_json
from smalti.core.noise import mixed_seed
from smalti.core.progress import Reporter
from smalti.core.recipe import SampleSection
from smalti.core.sampling.memory import free_memory, mebibytes, sampling_memory
from smalti.core.sampling_settings import SamplingSettings

LARGEST_BATCH = 64
GRID_ROWS = 20
LONGEST_NAME = 80  # of a class, in a folder's name


@dataclass(frozen=True)
class SamplingRun:
    """Draws images into a folder; what is there already is not drawn again.

    Attributes:
        tokenizer: decodes, on the device of the generator.
        generator: draws.
        options: how many, of which classes, and how.
        labels: the classes, in turn, as `chosen_classes` gives them.
        folder: where to.
        device: of both models.
        seed: of the run; with `options.seed` it makes the noise.
        names: of all classes, where they are known; or the prompts, which then count as classes.
        features: of the prompts `(prompts, P, E)`, on the device, for a generator of captions.
    """

    tokenizer: Tokenizer
    generator: Generator
    options: SampleSection
    labels: tuple[int, ...]
    folder: Path
    device: str
    seed: int = 0
    names: tuple[str, ...] = ()
    features: Tensor | None = None

    @property
    def count(self) -> int:
        """N."""
        return self.options.per_class * len(self.labels) or self.options.count

    @property
    def settings(self) -> SamplingSettings:
        """How tokens are drawn."""
        given = self.options.model_dump(include=set(SamplingSettings.model_fields) - {"seed"})
        return SamplingSettings(**given, seed=mixed_seed(self.seed, "sample", self.options.seed))

    def draw(self, reporter: Reporter) -> None:
        """Draw the chunks that are missing, then put all of them together.

        Raises:
            UserError: a generator of captions without any; memory for not even one image, or not for the batch size
                that is given; settings that the generator cannot take; no disk space left.
        """
        self.check_condition()
        size = self._batch_size(reporter)
        own = range(distributed.rank(), -(-self.count // size), distributed.world_size())
        chunks = {chunk: torch.arange(chunk * size, min(chunk * size + size, self.count)) for chunk in own}
        missing = [chunk for chunk in own if not self._chunk(chunk).exists()]
        total = sum(map(len, chunks.values()))
        done = total - sum(len(chunks[chunk]) for chunk in missing)
        with reporter.progress("sample", total, done, "image") as advance:
            for chunk in missing:
                images = self.images(chunks[chunk]).cpu().numpy()
                if self.options.files is not None:
                    self._write_files(chunks[chunk].tolist(), images)
                write_bytes(self._chunk(chunk), array_bytes(images))
                advance(len(images))
        distributed.barrier()
        if distributed.rank() == 0:
            self._join(size)

    @torch.inference_mode()
    def images(self, indices: Tensor) -> Tensor:
        """The samples of these numbers `(B,)`, uint8 `(B, H, W, 3)`."""
        indices = indices.to(self.device)
        tokens = self.generator.sample(self.conditions_of(indices), self.settings, indices)
        return to_uint8(self.tokenizer.decode(tokens, self.generator.token_layout))

    def labels_of(self, indices: Tensor) -> Tensor:
        """The classes of samples `(B,)`."""
        labels = torch.tensor(self.labels, device=indices.device)
        return labels[indices % len(labels)]

    def conditions_of(self, indices: Tensor) -> Tensor:
        """What the generator takes for samples `(B,)`: their classes `(B,)`, or features of captions `(B, P, E)`."""
        labels = self.labels_of(indices)
        return labels if self.features is None else self.features[labels]

    def check_condition(self) -> None:
        """Raise a `UserError` for a generator of captions without any."""
        if self.generator.captions is not None and self.features is None:
            raise UserError(
                f"the generator {self.generator.options.name!r} draws captions in the place of classes: give "
                "--generator, --tokenizer and --prompts"
            )

    def _batch_size(self, reporter: Reporter) -> int:
        """The first process chooses it; later ones, and restarts, find it."""
        path = self.folder / "chunks" / "batch_size.json"
        if distributed.rank() == 0 and not path.exists():
            memory = sampling_memory(self.generator, self.tokenizer, self.settings, self.features)
            free = free_memory(self.device)
            size = self.options.batch_size
            if size is None:
                size = memory.largest_batch(free, LARGEST_BATCH)
            else:
                memory.check(min(size, self.count), free)
            at_once = min(size, self.count)
            reporter.say(
                f"sample: batches of {at_once}, about {mebibytes(memory.peak(at_once))} MiB beside "
                f"{mebibytes(memory.weights)} MiB of weights"
            )
            write_json(path, size)
        distributed.barrier()
        return int(read_json(path, "the batch size of the run"))

    def _chunk(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.npy"

    def _write_files(self, indices: list[int], images: NDArray[np.uint8]) -> None:
        """Not atomic each: the chunk that is written after them tells that they are whole."""
        kind = self.options.files
        digits = len(str(self.count - 1))
        for index, image in zip(indices, images, strict=True):
            path = self.folder / "images" / self._class_folder(index) / f"{index:0{digits}d}.{kind}"
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, lossless=True)  # PNG files, which are so anyway, do not read it

    def _class_folder(self, index: int) -> str:
        label = self.labels[index % len(self.labels)]
        number = f"{label:0{len(str((len(self.names) or self.generator.classes) - 1))}d}"
        name = re.sub(r"[^\w-]+", "-", self.names[label])[:LONGEST_NAME].strip("-") if self.names else ""
        return f"{number}-{name}" if name else number

    def _join(self, size: int) -> None:
        chunks = [self._chunk(chunk) for chunk in range(-(-self.count // size))]
        first = np.load(chunks[0], mmap_mode="r")
        labels = self.labels_of(torch.arange(self.count)).numpy()
        with (
            atomic_write(self.folder / "samples.npz") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                _write_header(member, (self.count, *first.shape[1:]), first.dtype)
                for chunk in chunks:
                    member.write(np.load(chunk).tobytes())
            archive.writestr(zipfile.ZipInfo("arr_1.npy"), array_bytes(labels))
        rows = min(len(self.labels), GRID_ROWS, self.count)
        columns = max(1, min(self.options.grid_columns, self.count // len(self.labels)))
        wanted = [column * len(self.labels) + row for row in range(rows) for column in range(columns)]
        images = np.stack([np.load(chunks[index // size], mmap_mode="r")[index % size] for index in wanted])
        scale = enlargement(images.shape[1:3], VISIBLE_OF_MANY)
        save_grid(self.folder / "grid.png", images, columns, scale)
        # Under another name first: a process that is killed here must not leave the next one a part of them.
        spent = self.folder / f".chunks{TEMPORARY}"
        with disk_errors(spent):
            if spent.exists():
                shutil.rmtree(spent)
            (self.folder / "chunks").rename(spent)
            shutil.rmtree(spent)


def chosen_classes(wanted: Sequence[int | str], classes: int, names: Sequence[str] = ()) -> tuple[int, ...]:
    """Labels of classes given by number or by name, each once; all where none is given.

    Args:
        wanted: numbers or names.
        classes: how many there are.
        names: of all of them, or nothing where they are not known.

    Raises:
        UserError: a number out of range; an unknown name, with those that are close to it.
    """
    if not wanted:
        return tuple(range(classes))
    return tuple(dict.fromkeys(_label(each, classes, names) for each in wanted))


def _label(wanted: int | str, classes: int, names: Sequence[str]) -> int:
    if isinstance(wanted, int):
        if not 0 <= wanted < classes:
            raise UserError(
                f"sample.classes: {wanted} is out of range: there are {classes} classes, 0 to {classes - 1}"
            )
        return wanted
    if not names:
        raise UserError(
            f"sample.classes: {wanted!r} is a name, and the names of the {classes} classes are not known here: give "
            f"numbers from 0 to {classes - 1}"
        )
    if wanted in names:
        return list(names).index(wanted)
    lower: dict[str, str] = {name.lower(): name for name in names}
    close = [lower[name] for name in difflib.get_close_matches(wanted.lower(), lower, n=3, cutoff=0.6)]
    told = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {few(names, 10)}"
    raise UserError(f"sample.classes: no class is called {wanted!r}; {told}")


def _write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        member, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
