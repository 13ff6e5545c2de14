"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from smalti.core.errors import UserError

TEMPORARY = ".part"
DEEPEST = 100  # of mappings and lists in each other
FULL = (errno.ENOSPC, errno.EDQUOT)
# No right to write there; a file that is too large, a path through a file, a folder in the place of a file.
UNWRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG),
)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path` only when the block ends without an error.

    Raises:
        UserError: where the disk is full or the folder cannot be written; an older file stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder that appears at `path` only when the block ends without an error; yields where to write it.

    Raises:
        UserError: something other than an empty folder is there already; the disk is full or cannot be written.
    """
    path = Path(path).absolute()
    if (path.exists() and not path.is_dir()) or (path.is_dir() and any(path.iterdir())):
        raise UserError(f"{path} exists already and is not empty: give another folder, or remove it first")
    above = next(folder for folder in path.parents if folder.exists())  # folders in between are made at the end, too
    temporary = above / f".{path.name}{TEMPORARY}"
    try:
        with disk_errors(path):
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            temporary.mkdir()
            yield temporary
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what keeps `path` from being written (see `FULL` and `UNWRITABLE`) into a sentence about it."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(f"no disk space left to write {path}: free some and run the same command again") from error
        if error.errno in UNWRITABLE:
            raise UserError(f"{path} cannot be written: {error.strerror}") from error
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def write_text(path: str | Path, content: str) -> None:
    """Write UTF-8 text to `path`, whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """Read JSON; `what` says in errors which file was expected, e.g. `a run's layout`."""
    path = Path(path)
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected {what} there") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, expected {what}: {error}") from None


def parse_json(content: str | bytes) -> Any:
    """The data in a JSON text; whatever is wrong with it is a `ValueError`, too deep nesting as well."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(content: str | bytes) -> Any:
    """The data in a YAML text; whatever is wrong with it is a `ValueError`, too deep nesting as well."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text, depth = content if isinstance(content, str) else content.decode(), 0
        for event in yaml.parse(text, loader):  # the loader written in C follows any depth, off the end of its stack
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it is nested too deeply")
        return yaml.load(text, loader)
    except Exception as error:  # scalars that look like dates or numbers raise errors of many types
        raise ValueError(" ".join(str(error).split())[:300] or type(error).__name__) from error


def remove_temporaries(folder: Path) -> None:
    """Remove what writers of files and folders that were killed left behind under `folder`."""
    for path in [*folder.rglob(f".*{TEMPORARY}")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
