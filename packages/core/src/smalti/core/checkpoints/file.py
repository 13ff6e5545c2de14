"""Reading the weights in a published file, without ever running what the file says.

Safetensors files hold nothing but tensors. Files of `torch.save` are pickles: they are read with `weights_only=True`,
and where that refuses because the file also holds objects of other kinds (an `argparse.Namespace` of training
options), with an unpickler that imports nothing: whatever is not a tensor becomes an empty stand-in.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.weights import WEIGHTS, read_tensors

# Where the state dict lies in the dictionaries that training scripts save, the averaged weights first.
AVERAGED = ("ema", "model_ema")
CONTAINERS = ("model", "state_dict", "module")
PREFIXES = ("_orig_mod.", "module.")


def read_checkpoint(path: str | Path, *, ema: bool = True) -> dict[str, Tensor]:
    """The state dict in a published file.

    Args:
        path: a file of `torch.save` or safetensors, or a folder with `model.safetensors`.
        ema: take averaged weights where the file holds them under a key of their own.

    Returns:
        Tensors by published name, on the CPU; prefixes that wrappers add to all names are removed.

    Raises:
        UserError: no such file, a damaged one, or one without a state dict.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a checkpoint there")
    content = read_tensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    tensors = _state_dict(content, (*AVERAGED, *CONTAINERS) if ema else (*CONTAINERS, *AVERAGED))
    if not tensors:
        raise UserError(f"{path} holds no state dict; expected tensors by name, or a dictionary with one under "
                        f"{', '.join((*AVERAGED, *CONTAINERS))}")  # fmt: skip
    while prefix := next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _state_dict(content: object, containers: tuple[str, ...], depth: int = 3) -> dict[str, Tensor]:
    """The tensors of the first container that has any, else those of `content` itself."""
    if not isinstance(content, Mapping):
        return {}
    for key in containers if depth else ():  # wrappers may lie in each other
        if inner := _state_dict(content.get(key), containers, depth - 1):
            return inner
    named = ((name, value) for name, value in content.items() if isinstance(name, str))
    return {name: value.detach() for name, value in named if isinstance(value, Tensor)}


def _read_pickle(path: Path) -> Any:
    # The file is a stranger's: whatever stops its reading is its damage.
    damaged = f"{path} is damaged or not a checkpoint of torch.save or safetensors"
    zipped = False  # as torch.save writes since 1.6
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise UserError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol, of which nothing follows
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except pickle.UnpicklingError:
        if not zipped:  # torch's format before 1.6, or no checkpoint at all
            raise UserError(damaged) from None
    except Exception:  # noqa: BLE001
        raise UserError(damaged) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_INERT_PICKLE)
    except Exception:  # noqa: BLE001
        raise UserError(damaged) from None


class _StandIn(dict[Any, Any]):
    """Takes the place of every object that is neither a tensor nor plain: keeps entries, does nothing else.

    Entries, because a state dict may lie in a dictionary of a class of its own.
    """

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Accept whatever the real class would."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be the key of an entry

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setstate__(self, state: object) -> None:
        """Forget it."""

    def append(self, item: object) -> None:
        """Forget it."""

    def extend(self, items: object) -> None:
        """Forget it."""

    def add(self, item: object) -> None:
        """Forget it."""

    def __call__(self, *_: object, **__: object) -> _StandIn:
        return self


_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
_TORCH = {
    name
    for name in dir(torch)
    if isinstance(getattr(torch, name), torch.dtype) or name in ("Size", "device")
}  # fmt: skip


def _guarded(rebuild: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same as a function of its own: a pickle can set attributes of what it finds, not those of torch's."""

    def call(*arguments: object) -> Tensor:
        return rebuild(*arguments)

    return call


class _InertUnpickler(pickle.Unpickler):
    """Finds the constructors of tensors and plain containers; any other name is a stand-in, nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        """The one of the allowed names, or a stand-in class; storages are found by torch's subclass of this."""
        if module == "torch._utils" and name in _REBUILDERS:
            return _guarded(getattr(torch._utils, name))
        if module == "torch" and name in _TORCH:
            return getattr(torch, name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return type("StandIn", (_StandIn,), {})


# What `torch.load` needs of the module `pickle` to read the zip format.
_INERT_PICKLE = SimpleNamespace(Unpickler=_InertUnpickler, __name__="inert_pickle")
