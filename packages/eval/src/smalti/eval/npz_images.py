"""Images in the `.npz` files of ADM: `arr_0`, read in batches and never as a whole, and their labels `arr_1`.

Legend: N images, B images of a batch, H W pixels.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from smalti.core.data.array_file import parsed_header
from smalti.core.errors import UserError

IMAGES, LABELS = "arr_0", "arr_1"
LOCAL_HEADER = 30  # bytes of a zip file before a member's name


class NpzImages:
    """The images of an `.npz` file, unpacked as a stream; processes that share them read them where they lie.

    They are read and not mapped, because mapped pages count as memory of the process for as long as there is room.

    Args:
        path: the file.

    Raises:
        UserError: no such file, damaged, or `arr_0` is not uint8 `(N, H, W, 3)`.

    Attributes:
        shape: `(N, H, W, 3)`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with opened_member(path, IMAGES) as (file, shape, dtype):
            if len(shape) != 4 or shape[3] != 3 or 0 in shape[1:] or dtype != np.uint8:
                raise UserError(f"{path}: images are arr_0 uint8 (N, H, W, 3), but it is {dtype} {shape}")
            self._offset = _offset(path, file.tell())
        self.shape: tuple[int, ...] = shape

    def __len__(self) -> int:
        return self.shape[0]

    def labels(self) -> NDArray[np.int64] | None:
        """The classes of all images, `(N,)`, None where the file does not tell them.

        Raises:
            UserError: `arr_1` is damaged, or not one integer for each image.
        """
        if LABELS not in array_names(self.path):
            return None
        with opened_member(self.path, LABELS) as (file, shape, dtype):
            if shape != (len(self),) or dtype.kind not in "iu":
                raise UserError(f"{self.path}: labels are arr_1 integer ({len(self)},), but it is {dtype} {shape}")
            return values_of(self.path, file, shape, dtype).astype(np.int64)

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Batches `rank`, `rank + world_size`, ... of `size` images uint8 `(B, H, W, 3)`, after their first index."""
        starts = range(0, len(self), size)
        image = math.prod(self.shape[1:])
        if self._offset is not None and world_size > 1:
            with self.path.open("rb") as plain:
                for start in starts[rank::world_size]:
                    plain.seek(self._offset + start * image)
                    count = min(size, len(self) - start)
                    yield start, _pixels(exactly(self.path, plain, count * image), (count, *self.shape[1:]))
            return
        with opened_member(self.path, IMAGES) as (file, _, _):
            for number, start in enumerate(starts):
                count = min(size, len(self) - start)
                content = exactly(self.path, file, count * image)
                if number % world_size == rank:
                    yield start, _pixels(content, (count, *self.shape[1:]))


@contextmanager
def opened_member(
    path: Path, name: str, *, symmetric: bool = False
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """A member of an `.npz` file at the start of its values, with their shape and type.

    Args:
        path: of the file.
        name: of the member, without its ending.
        symmetric: it is a symmetric matrix, whose columns are as good as its rows.

    Raises:
        UserError: the file is missing or damaged, has no such member, or has it in column order.
    """
    with ExitStack() as opened:
        try:
            archive = opened.enter_context(zipfile.ZipFile(path))
            file = opened.enter_context(archive.open(f"{name}.npy"))
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            with parsed_header():
                shape, column_order, dtype = read(file)
            told = archive.getinfo(f"{name}.npy").file_size
        except KeyError:
            raise UserError(f"{path} has no array {name}") from None
        except FileNotFoundError:
            raise UserError(f"{path} does not exist") from None
        except Exception as error:  # NumPy parses the header as Python source: broken bytes raise errors of many types
            raise _damaged(path, error) from error
        if column_order and len(shape) > 1 and not symmetric:
            raise UserError(f"{path}: {name} is in column order, expected rows first as numpy saves by default")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > told:
            raise UserError(f"{path} is damaged: {name} is {dtype} {shape}, but has {told} bytes")
        yield file, shape, dtype


def exactly(path: Path, file: IO[bytes], count: int) -> bytes:
    """The next `count` bytes of a member.

    Raises:
        UserError: it ends before.
    """
    try:
        content = file.read(count)
    except Exception as error:  # of what unpacks it
        raise _damaged(path, error) from error
    if len(content) != count:
        raise UserError(f"{path} is damaged: it ends after {len(content)} of {count} bytes")
    return content


def values_of(path: Path, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """All values of a member; errors as `exactly`."""
    return np.frombuffer(exactly(path, file, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def array_names(path: Path) -> set[str]:
    """The names of the arrays of an `.npz` file.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is damaged or not an .npz file: {reason}")


def _pixels(content: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _offset(path: Path, header: int) -> int | None:
    """Where in the file the first image begins, after so many bytes of its member; None where it is compressed."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{IMAGES}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER)
    name, extra = (int.from_bytes(local[place : place + 2], "little") for place in (26, 28))
    return member.header_offset + LOCAL_HEADER + name + extra + header
