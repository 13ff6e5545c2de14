"""How much memory sampling takes at its peak: from two small trials to any batch size, before a run starts.

Beside weights, all that sampling holds (caches, activations, what the decoder makes) has a part that is the same for
any batch and a part that every image adds. The generator and the decoder work one after the other, and each is a
straight line in the batch size; the larger of both is the peak.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.errors import UserError
from smalti.core.sampling_settings import SamplingSettings

TRIALS = (1, 3)
USABLE = 0.9  # of the memory that is free: libraries take scratch space of their own
GROUP = Path("/sys/fs/cgroup")  # of this process, where it is in a container


@dataclass(frozen=True)
class SamplingMemory:
    """Peak memory of a batch.

    Attributes:
        weights: bytes of both models, in memory already.
        phases: of the generator and of the decoder, the bytes that any batch takes, and those of every image.
    """

    weights: int
    phases: tuple[tuple[int, int], ...]

    def peak(self, batch: int) -> int:
        """Bytes beside the weights that a batch of so many images takes at its peak."""
        return max(fixed + batch * each for fixed, each in self.phases)

    def largest_batch(self, free: int, most: int) -> int:
        """`most`, halved until a batch fits into `free` bytes.

        Raises:
            UserError: not even one image fits.
        """
        batch = most
        while batch > 1 and self.peak(batch) > USABLE * free:
            batch //= 2
        self.check(batch, free)
        return batch

    def check(self, batch: int, free: int) -> None:
        """Raise a `UserError` where a batch does not fit into `free` bytes."""
        if self.peak(batch) > USABLE * free:
            images = "1 image" if batch == 1 else f"{batch} images at once"
            remedy = "take a smaller model, or a machine with more" if batch == 1 else "give a smaller batch_size"
            raise UserError(
                f"sampling {images} needs about {mebibytes(self.peak(batch))} MiB beside the weights, and "
                f"{mebibytes(free)} MiB of memory are free, of which {USABLE:.0%} may be used: {remedy}"
            )


def sampling_memory(
    generator: Generator, tokenizer: Tokenizer, settings: SamplingSettings, features: Tensor | None = None
) -> SamplingMemory:
    """Measure both phases with the first few images of a run.

    Args:
        generator: draws for real, some images more than the run will.
        tokenizer: decodes them; on the same device.
        settings: of the run; guidance doubles what the generator takes.
        features: of captions, where the generator takes these.
    """
    weights = [*generator.parameters(), *generator.buffers(), *tokenizer.parameters(), *tokenizer.buffers()]
    device = weights[0].device if weights else torch.device("cpu")

    def labels(batch: int) -> Tensor:
        rows = torch.arange(batch, device=device)
        return rows % generator.classes if features is None else features[rows % len(features)]

    with torch.inference_mode():
        # What is made once and kept, as packed weights are, shall be there before anything is measured.
        generator.sample(labels(1), settings)
        drawn, decoded = [], []
        for batch in TRIALS:
            tokens, peak = _peak(lambda batch=batch: generator.sample(labels(batch), settings), device)  # type: ignore[misc]
            drawn.append(peak)
            _, peak = _peak(
                lambda tokens=tokens: to_uint8(tokenizer.decode(tokens, generator.token_layout)),  # type: ignore[misc]
                device,
            )
            decoded.append(peak)
    held = {weight.untyped_storage()._cdata: weight.untyped_storage().nbytes() for weight in weights}
    return SamplingMemory(sum(held.values()), (_line(drawn), _line(decoded)))


def free_memory(device: str) -> int:
    """Bytes that this process may still take on a device: its share of what the machine, or its group, has left."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return _free_on_machine() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def mebibytes(size: int) -> int:
    """Rounded up."""
    return -(-size // 2**20)


def _free_on_machine() -> int:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    table = Path("/proc/meminfo")
    if table.exists():  # what files have cached can be given up, here and in the group
        entries = dict(line.split(":") for line in table.read_text().splitlines())
        free = int(entries["MemAvailable"].split()[0]) * 1024
    limit = GROUP / "memory.max"
    if limit.exists() and limit.read_text().strip().isdigit():
        used = int((GROUP / "memory.current").read_text())
        parts = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        cached = int(parts["active_file"]) + int(parts["inactive_file"])
        free = min(free, int(limit.read_text()) - used + cached)
    return free


def _line(peaks: list[int]) -> tuple[int, int]:
    few, many = TRIALS
    each = max(0, (peaks[1] - peaks[0]) // (many - few))
    return max(0, peaks[0] - few * each), each


def _peak(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, int]:
    """What `work` gives, and the most bytes that it held at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Allocations() as allocations:
        result = work()
    return result, allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, for as long as they live.

    Attributes:
        peak: the most at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self._live = 0
        self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and torch would import its compiler first, which takes seconds."""
        return False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, then count what is new of its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in _tensors((result,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes and all(key != given.untyped_storage()._cdata for given in _tensors(args)):
                self._sizes[key] = storage.nbytes()
                self._live += self._sizes[key]
                weakref.finalize(storage, self._freed, key).atexit = False
        self.peak = max(self.peak, self._live)
        return result

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operator, but packed weights, which have no storage to ask."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout is torch.strided:
                yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
