"""Stage `sample`: from a generator to images."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.core import distributed
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.images import save_grid, to_uint8
from smalti.core.errors import UserError
from smalti.core.files import atomic_write, read_json, write_bytes
from smalti.core.noise import mixed_seed
from smalti.core.recipe import Recipe, SampleSection
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.stage import Stage
from smalti.core.weights import fingerprint

VISIBLE = 64  # pixels: smaller images are enlarged in the grid by whole factors


class Sample(Stage):
    """Draws images of all classes in turn; writes `samples/samples.npz` (ADM's layout) and `samples/grid.png`.

    Images are drawn in chunks of `batch_size`; chunk k holds samples `[k * batch_size, (k + 1) * batch_size)`
    whatever the number of processes, so that every sample is computed in the same company.
    """

    name = "sample"
    sections = ("seed", "sample")
    after = ("train-generator",)
    outputs = ("samples",)

    @property
    def options(self) -> SampleSection:
        """How many images, and how."""
        options = self.context.recipe.sample
        assert options is not None, "the pipeline leaves this stage out"
        return options

    def run(self) -> None:
        """Draw the chunks that are missing, then join them."""
        context, options = self.context, self.options
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer").to(context.device)
        generator = Generator.from_pretrained(context.run / "generator").to(context.device)
        self._check_pair(tokenizer)
        settings = sampling_settings(context.recipe)
        own = range(distributed.rank(), -(-options.count // options.batch_size), distributed.world_size())
        missing = [chunk for chunk in own if not self._chunk(chunk).exists()]
        total = sum(len(self._indices(chunk)) for chunk in own)
        done = total - sum(len(self._indices(chunk)) for chunk in missing)
        with context.reporter.progress(self.name, total, done, "image") as advance, torch.inference_mode():
            for chunk in missing:
                indices = self._indices(chunk).to(context.device)
                images = draw(generator, tokenizer, indices, settings)
                write_bytes(self._chunk(chunk), _npy(images.cpu().numpy()))
                advance(len(images))
        distributed.barrier()
        if distributed.rank() == 0:
            self._join(generator.classes)

    def _check_pair(self, tokenizer: Tokenizer) -> None:
        path = self.context.run / "generator" / "tokenizer.json"
        trained_with = read_json(path, "the tokenizer's fingerprint")["tokenizer"]
        found = fingerprint(tokenizer, tokenizer.config())
        if trained_with != found:
            raise UserError(
                f"the generator in {path.parent} was trained on tokens of another tokenizer ({trained_with}, this "
                f"one is {found}): run `smalti tokenize` and `smalti train generator` again"
            )

    def _chunk(self, chunk: int) -> Path:
        return self.context.run / "samples" / "chunks" / f"{chunk:06d}.npy"

    def _indices(self, chunk: int) -> torch.Tensor:
        options = self.options
        start = chunk * options.batch_size
        return torch.arange(start, min(start + options.batch_size, options.count))

    def _join(self, classes: int) -> None:
        options = self.options
        chunks = [self._chunk(chunk) for chunk in range(-(-options.count // options.batch_size))]
        first = np.load(chunks[0], mmap_mode="r")
        folder = self.context.run / "samples"
        labels = np.arange(options.count, dtype=np.int64) % classes
        with (
            atomic_write(folder / "samples.npz") as file,
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
        ):
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                _write_header(member, (options.count, *first.shape[1:]), first.dtype)
                for chunk in chunks:
                    member.write(np.load(chunk).tobytes())
            archive.writestr(zipfile.ZipInfo("arr_1.npy"), _npy(labels))
        columns = min(options.grid_columns, options.count // classes)
        if columns:
            wanted = [index * classes + label for label in range(classes) for index in range(columns)]
            size = options.batch_size
            images = np.stack([np.load(chunks[index // size], mmap_mode="r")[index % size] for index in wanted])
            save_grid(folder / "grid.png", images, columns, scale=max(1, VISIBLE // images.shape[1]))
        shutil.rmtree(folder / "chunks")


def sampling_settings(recipe: Recipe) -> SamplingSettings:
    """How the samples of a run are drawn."""
    options = recipe.sample
    assert options is not None, "the pipeline leaves this stage out"
    return SamplingSettings(
        **options.model_dump(include=set(SamplingSettings.model_fields) - {"seed"}),
        seed=mixed_seed(recipe.seed, Sample.name, options.seed),
    )


def draw(generator: Generator, tokenizer: Tokenizer, indices: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """The samples numbered `indices` `(N,)`, of all classes in turn, as images uint8 `(N, H, W, 3)`."""
    tokens = generator.sample(indices % generator.classes, settings, indices)
    return to_uint8(tokenizer.decode(tokens, generator.token_layout))


def _npy(array: NDArray[Any]) -> bytes:
    """The bytes of a `.npy` file; numpy's own writing to a file loses the reason where a disk is full."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    np.lib.format.write_array_header_1_0(
        member, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
