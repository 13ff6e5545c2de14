"""Weights on disk: `model.safetensors` beside `config.json`, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from smalti.core.errors import UserError, few
from smalti.core.files import disk_errors, read_json, write_bytes, write_json
from smalti.core.options import sentences

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "ema.safetensors"

# What building may make for each value in a file, where some are shared or made twice; what any small model may; and
# what a single tensor may hold in any case, for it need not be of weights.
ROOM, SMALL, TABLE = 4, 1 << 20, 1 << 26
MADE_BY_SIZE = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.eye)

Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], config: Mapping[str, Any]) -> Model:
    """`config` as `model`; what is wrong with it becomes one sentence."""
    try:
        return model.model_validate(config)
    except ValidationError as error:
        raise UserError(f"the configuration cannot be used: {sentences(error)}") from None


class Pretrained:
    """Saving and loading for a module that can tell its configuration. Mix it into an `nn.Module`."""

    kind: str

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What is needed to build the module again, as JSON."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the module from what `config()` gave."""

    def save_pretrained(
        self,
        folder: str | Path,
        ema: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write configuration and weights in the place of those that the folder holds.

        Args:
            folder: where to; made where it is missing.
            ema: averaged weights under the same names, to go beside them.
            weights: its own, where the module itself holds only a part of them.
        """
        assert isinstance(self, nn.Module)
        folder = Path(folder)
        if ema is None:
            with disk_errors(folder / EMA_WEIGHTS):  # of an earlier save, which would go before these weights
                (folder / EMA_WEIGHTS).unlink(missing_ok=True)
        save_tensors(folder / WEIGHTS, self.state_dict() if weights is None else weights)
        if ema is not None:
            save_tensors(folder / EMA_WEIGHTS, ema)
        write_json(folder / CONFIG, self.config())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, ema: bool = True, revision: str | None = None) -> Self:
        """Load from a folder, from the zoo, or from the hub by repository name.

        Args:
            name: a folder that `save_pretrained` wrote; a name that `smalti zoo` lists, whose published file is
                fetched from its publisher and imported; or `owner/repository`.
            ema: take the averaged weights where there are any.
            revision: of the hub repository, where `name` is one.

        Raises:
            UserError: nothing there, a damaged file, weights that do not belong to the configuration, or one that asks
                for far more than they fill.
        """
        folder = Path(name)
        if not folder.is_dir():
            if "/" not in str(name):
                return cls._from_zoo(str(name), ema=ema)
            folder = _download(str(name), revision)
        config = read_json(folder / CONFIG, f"the configuration of a {cls.kind}")
        if not isinstance(config, dict) or config.get("kind") != cls.kind:
            found = config.get("kind") if isinstance(config, dict) else None
            raise UserError(f"{folder} does not hold a {cls.kind}, its {CONFIG} says kind {found!r}")
        averaged = folder / EMA_WEIGHTS
        path = averaged if ema and averaged.exists() else folder / WEIGHTS
        tensors = read_tensors(path)
        module = cls._built(config, folder / CONFIG, sum(tensor.numel() for tensor in tensors.values()))
        assert isinstance(module, nn.Module)
        _fill(module, tensors, path)
        module.eval()
        return module

    @classmethod
    def _built(cls, config: Mapping[str, Any], where: Path, values: int) -> Self:
        try:
            most = ROOM * values + SMALL
            with _NoLargerTensor(max(most, TABLE)), _at_most(most):
                return cls.from_config(config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # what modules raise that are told impossible sizes
            raise UserError(f"no {cls.kind} can be built as {where} says: {_first_line(error)}") from error

    @classmethod
    def _from_zoo(cls, name: str, *, ema: bool) -> Self:
        from smalti.core.checkpoints.importing import import_checkpoint
        from smalti.core.checkpoints.zoo import fetch, zoo_model

        try:
            model = zoo_model(name)
        except UserError as error:
            raise UserError(f"{name} is neither a folder here nor a hub name owner/repository, and {error}") from None
        if model.kind != cls.kind:
            raise UserError(f"{name} is {'an' if model.kind[0] in 'aeiou' else 'a'} {model.kind}, not a {cls.kind}")
        return import_checkpoint(fetch(model), model.layout, model.overrides, ema=ema)  # type: ignore[return-value]

    def push_to_hub(self, repository: str, *, private: bool = False) -> None:
        """Upload configuration and weights to the hub repository `owner/name`, making it where needed."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repository, folder_path=folder)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except HFValidationError:
        raise UserError(f"{name} is neither a folder here nor a hub name of the form owner/repository") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{name} is not a folder here and could not be had from the hub ({type(error).__name__}); "
            f"give a folder with {CONFIG} and {WEIGHTS}, or a repository that can be reached"
        ) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a state dict as safetensors, whole or not at all; shared storage is written out per name."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors; a missing or damaged file is a `UserError`."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected the weights there")
    try:
        return load_file(path)
    except Exception as error:  # noqa: BLE001  # beside its own, errors of types and sizes that torch lacks
        raise UserError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from None


class _NoLargerTensor(TorchFunctionMode):
    """Tensors that are made meanwhile may have so many values: a larger one is refused before memory is taken."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in MADE_BY_SIZE:
            # On the meta device a tensor has a size and no values.
            given = {name: value for name, value in kwargs.items() if name not in ("device", "generator")}
            tried = function(*args, **given, device="meta")
            if tried.numel() > self.values:
                raise UserError(f"it asks for a tensor {tuple(tried.shape)} far beyond what the weights beside it fill")
        return function(*args, **kwargs)


@contextmanager
def _at_most(values: int) -> Iterator[None]:
    """Modules that are built meanwhile may have so many parameters: a file may ask for networks without end."""
    left = values

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.numel()
        if left < 0:
            raise UserError(f"it asks for a {type(module).__name__} far beyond what the weights beside it fill")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load_tensors(module: nn.Module, path: Path) -> None:
    """Fill `module` from a safetensors file; refuse a file of another module, naming what does not fit."""
    _fill(module, read_tensors(path), path)


def _fill(module: nn.Module, found: Mapping[str, Tensor], path: Path) -> None:
    wanted = module.state_dict()
    missing = sorted(wanted.keys() - found.keys())
    foreign = sorted(found.keys() - wanted.keys())
    problems = [
        *([f"missing {few(missing)}"] if missing else []),
        *([f"not of this model {few(foreign)}"] if foreign else []),
        *other_shapes(found, wanted)[:3],
    ]
    if problems:
        raise UserError(f"{path} does not fit the configured {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(found)


def other_shapes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What to say of every tensor of both that has another shape than it should."""
    return [
        f"{name} is {tuple(found[name].shape)}, should be {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """Sixteen hex digits that identify a configuration with its weights (SHA-256 over both)."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
