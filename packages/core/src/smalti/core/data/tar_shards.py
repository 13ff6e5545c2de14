"""Tar shards: read as streams, where every cut and damaged byte that the formats can show is an error; and written.

`webdataset` opens the stream and groups the files of a sample. In between stands a reader of our own,
because `tarfile` takes a broken header for the end of the archive, and its stream mode never checks gzip's
checksum: both would lose samples in silence.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import signal
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys
from webdataset.writer import TarWriter

from smalti.core.data.dataset import FilePart
from smalti.core.errors import UserError
from smalti.core.files import atomic_write

# What the exit status of a command is when its reader closes the pipe early: by itself, or told by a shell.
_BROKEN_PIPE = (-signal.SIGPIPE, 128 + signal.SIGPIPE)
LARGEST = 1 << 30  # bytes of one file in a shard, which is read whole; a few MB that are packed unfold to any size
_UNPACKERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def read_shard(url: str) -> Iterator[dict[str, Any]]:
    """The samples of one shard in stored order: `__key__`, and the bytes of each file by its extension.

    Args:
        url: a path or anything else that `webdataset.gopen` takes; tar, plain or compressed.

    Raises:
        UserError: the shard cannot be opened, is damaged, or ends early; says after how many samples.
    """
    stream = _opened(url)
    samples = 0
    try:
        for sample in group_by_keys(_files(stream)):
            yield sample
            samples += 1
        stream.close()
    except Exception as error:  # of the formats, and of numbers in headers that nobody has
        reason = _command_failure(stream) or _reason(error)
        raise UserError(f"shard {url} is damaged or incomplete after {samples} samples: {reason}") from error
    finally:
        with suppress(OSError):  # a command whose output we no longer want ends with a broken pipe
            stream.close()


def is_plain(url: str) -> bool:
    """Whether it is a local tar file that is not compressed, so that any sample of it can be read at once."""
    if not _is_local(url):
        return False
    with _opened(url) as file:
        return not file.peek(6).startswith(tuple(_UNPACKERS))


def _is_local(url: str) -> bool:
    """Whether it is a file; one may be called like a command, and a command may be too long for a file's name."""
    return os.path.isfile(url)  # noqa: PTH113


def index_shard(path: str) -> list[dict[str, Any]]:
    """What `read_shard` gives of a plain local file, with a `FilePart` for the bytes of each file; raises the same."""
    samples: list[dict[str, Any]] = []
    try:
        with Path(path).open("rb") as file:
            samples.extend(group_by_keys(_parts(path, file)))
    except Exception as error:
        raise UserError(
            f"shard {path} is damaged or incomplete after {len(samples)} samples: {_reason(error)}"
        ) from error
    return samples


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Write a plain shard, whole or not at all; the same samples give the same bytes.

    Args:
        path: of the shard.
        samples: key, and bytes of each file by its extension. Dots in a key become underscores, for WebDataset ends
            keys at the first, and slashes in front of it are dropped.

    Returns:
        How many they were.

    Raises:
        UserError: two neighbours of one key, or a disk that is full.
    """
    count, last = 0, None
    with atomic_write(path) as file, TarWriter(file, mtime=0, encoder=False, compress=False) as tar:
        for name, files in samples:
            key = name.lstrip("/").replace(".", "_")
            if key == last:
                raise UserError(f"two samples in a row have the key {key!r}, in {path} they would be one")
            tar.write({"__key__": key, **files})
            count, last = count + 1, key
    return count


def _reason(error: Exception) -> str:
    """What an error says; webdataset adds where it was to the arguments of any."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0] if error.args else error)


def _parts(path: str, file: Any) -> Iterator[dict[str, Any]]:
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
        while (member := tar.next()) is not None:
            if _is_file(member):
                yield {"fname": member.name, "data": FilePart(path, member.offset_data, member.size), "__url__": ""}
            tar.members = []  # type: ignore[attr-defined]  # headers, which would pile up
        _check_end(tar)


def _is_file(member: tarfile.TarInfo) -> bool:
    """Whether it is a file whose bytes lie in the archive as they are."""
    if member.issparse() or not 0 <= member.size <= LARGEST:
        raise tarfile.ReadError(f"{member.name!r} is sparse or larger than {LARGEST >> 20} MiB")
    return member.isreg()


def _check_end(tar: tarfile.TarFile) -> None:
    assert tar.fileobj is not None
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("the end-of-archive marker is cut off")


def _opened(url: str) -> Any:
    try:
        return Path(url).open("rb") if _is_local(url) else gopen(url)
    except FileNotFoundError:
        raise UserError(f"shard {url} does not exist") from None
    except (OSError, ValueError) as error:
        raise UserError(f"shard {url} cannot be opened: {error}") from error


def _command_failure(stream: Any) -> str | None:
    """Why the command behind a pipe failed, where that is what happened."""
    if not isinstance(stream, Pipe):
        return None
    with suppress(OSError):
        stream.close()
    status = stream.proc.returncode
    return f"its command ended with exit status {status}" if status not in (0, *_BROKEN_PIPE) else None


def _files(stream: Any) -> Iterator[dict[str, Any]]:
    """Name and content of each file of a tar stream, as `group_by_keys` takes them."""
    start = getattr(stream, "stream", stream).peek(6)
    unpacked = (opener(stream) for magic, opener in _UNPACKERS.items() if start.startswith(magic))
    file: Any = next(unpacked, stream)
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
        for member in tar:
            content = tar.extractfile(member) if _is_file(member) else None
            if content is not None:
                yield {"fname": member.name, "data": content.read(), "__url__": ""}
            tar.members = []  # type: ignore[attr-defined]  # headers, which would pile up
        _check_end(tar)
    while file.read(1 << 16):  # checksums are checked at the end, and a command must be able to finish
        continue


class _Header(tarfile.TarInfo):
    """A tar header that tells of damage where `TarFile` takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                raise  # the block of zeros that ends an archive
            reason = str(error) if buf else "the end-of-archive marker is missing"
            raise tarfile.ReadError(reason) from error
        if header.type != tarfile.REGTYPE and not 0 <= header.size <= LARGEST:  # long names and the like are kept whole
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header
