"""Where a data set lies: the option `path` or an environment variable, and what to say where nothing is."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from smalti.core.errors import UserError, few

ANY_ROOT = "DATASET_ROOT"


def located(path: str | None, variable: str, expected: str) -> Path:
    """The folder or file of a data set.

    Args:
        path: the option `path`; where it is None, the environment variables `variable`, then `DATASET_ROOT`, tell.
        variable: of this data set.
        expected: what lies there, in words.

    Raises:
        UserError: none of the three is given, or nothing lies there.
    """
    variables = dict.fromkeys((variable, ANY_ROOT))
    given = path or next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if given is None:
        raise UserError(f"data.path is missing and {' or '.join(variables)} is not set: give {expected}")
    place = Path(given).expanduser()
    if not place.exists():
        raise wrong_place(place, expected)
    return place


def wrong_place(path: Path, expected: str) -> UserError:
    """The error where `path` is not what was expected there; it shows what is."""
    if path.is_file():
        return UserError(f"{path} is a file, expected {expected}")
    if path.is_dir():
        return UserError(f"{path} is not {expected}: {what_is_there(path)}")
    return UserError(f"{path} does not exist, expected {expected}: {what_is_there(path)}")


def what_is_there(path: Path) -> str:
    """What the folder `path` holds, or the nearest that could hold `path`; a glob is looked for above its stars."""
    is_folder = path.is_dir()
    folder = path if is_folder else next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    if not folder.is_dir():
        return f"there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"the folder {folder} holds {few(names, 5)}" if names else f"the folder {folder} is empty"
