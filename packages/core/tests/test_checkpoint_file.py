"""Published files are read for their tensors; nothing that they say is ever done."""

import argparse
import collections
import io
import os
import pickle
import pickletools
import random
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.errors import UserError
from smalti.core.weights import save_tensors

WEIGHTS = {"encoder.weight": torch.arange(6.0).reshape(2, 3), "encoder.bias": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture(autouse=True)
def traces(tmp_path, monkeypatch):
    """Whatever runs in a test would leave a file named `executed` or `imported` here."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "imported").exists()


def damaged(path):
    return f"{path} is damaged or not a checkpoint of torch.save or safetensors"


def told(path, **options):
    with pytest.raises(UserError) as caught:
        read_checkpoint(path, **options)
    return str(caught.value)


def same(found, expected=WEIGHTS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


def touch():
    """A command that shows that it ran."""
    return "touch executed"


class ByReduce:
    def __reduce__(self):
        return os.system, (touch(),)


class ByBuild:
    """An object of a class whose state, when set, is a command: BUILD calls `__setstate__`."""

    def __reduce__(self):
        return _Builder, (), touch()


class _Builder:
    def __setstate__(self, state):
        os.system(state)


class BySetItem:
    """Items that go into an object whose `__setitem__` runs them."""

    def __reduce__(self):
        return _Runner, (), None, None, iter([("command", touch())])


class _Runner:
    def __setitem__(self, key, value):
        os.system(value)


class ByEvaluation:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch executed')",)


ATTACKS = (ByReduce, ByBuild, BySetItem, ByEvaluation)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["beside", "within", "above"])
def test_hostile_objects_do_nothing(tmp_path, attack, protocol, place):
    content = {
        "beside": {"model": WEIGHTS, "args": attack()},
        "within": {"model": {**WEIGHTS, "hook": attack()}},
        "above": {"model": WEIGHTS, "epochs": [{"deep": (attack(),)}]},
    }[place]
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert any(argument == touch() or "touch" in str(argument) for argument in _arguments(archive))
    same(read_checkpoint(tmp_path / "file.pt"))


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_attacks_are_real(tmp_path, monkeypatch, attack):
    torch.save({"model": WEIGHTS, "args": attack()}, tmp_path / "file.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "elsewhere" / "executed").exists()


def _arguments(archive):
    (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
    return [argument for _, argument, _ in pickletools.genops(archive.read(name))]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_hostile_files_of_the_old_format_are_refused(tmp_path, attack, protocol):
    content = {"model": WEIGHTS, "args": attack()}
    torch.save(content, tmp_path / "file.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    assert told(tmp_path / "file.pt") == damaged(tmp_path / "file.pt")


def test_a_bare_pickle_is_refused(tmp_path):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"model": ByReduce()}))
    assert told(tmp_path / "file.pt") == damaged(tmp_path / "file.pt")


def _with_pickle(path, pickled):
    """A zip file of `torch.save` whose pickle is replaced."""
    buffer = io.BytesIO()
    torch.save(WEIGHTS, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))


@pytest.mark.parametrize("opcodes", [b"ctoy_side_effect\nInnocent\n", b"\x8c\x0ftoy_side_effect\x8c\x08Innocent\x93"])
def test_no_module_is_imported(tmp_path, opcodes):
    """GLOBAL, and STACK_GLOBAL of protocol 4, name a class of a module with side effects; REDUCE makes an object."""
    assert "toy_side_effect" not in sys.modules
    _with_pickle(tmp_path / "file.pt", b"\x80\x04}\x8c\x04args" + opcodes + b")R" + b"s.")
    assert "holds no state dict" in told(tmp_path / "file.pt")
    assert "toy_side_effect" not in sys.modules


@pytest.mark.parametrize(
    "name", ["_rebuild_tensor_v2", "_rebuild_parameter", "_import_dotted_name", "classproperty.__get__"]
)
def test_functions_of_torch_stay_as_they_are(tmp_path, name):
    """BUILD with a pair of states sets attributes of whatever the pickle names."""
    build = b"ctorch._utils\n" + name.encode() + b"\n(N}\x8c\x0c__defaults__)stb"
    _with_pickle(tmp_path / "file.pt", b"\x80\x04}\x8c\x01a" + build + b"s.")
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))
    assert told(tmp_path / "file.pt")
    assert (torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))) == before


def test_options_of_training_scripts_are_read_over(tmp_path):
    class Box(collections.OrderedDict):
        """A dictionary of the kind that configuration libraries write."""

    module = types.ModuleType("no_such_library")
    Box.__module__, Box.__qualname__, module.Box = "no_such_library", "Box", Box
    sys.modules["no_such_library"] = module
    try:
        content = {
            "model": Box(WEIGHTS),
            "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(betas=(0.9, 0.95)), box=Box(a=1)),
            "best": np.float64(1.5),
            "steps": np.int64(3),
            "history": np.arange(3),
            "seen": {argparse.Namespace},
            "path": tmp_path,
        }
        torch.save(content, tmp_path / "file.pt")
    finally:
        del sys.modules["no_such_library"]
    same(read_checkpoint(tmp_path / "file.pt"))


def test_averaged_weights_are_preferred(tmp_path):
    averaged = {name: tensor * 2 for name, tensor in WEIGHTS.items()}
    torch.save({"ema": averaged, "model": WEIGHTS, "args": argparse.Namespace()}, tmp_path / "file.pt")
    same(read_checkpoint(tmp_path / "file.pt"), averaged)
    same(read_checkpoint(tmp_path / "file.pt", ema=False))


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, "epoch": 3},
        {"module": {"model": WEIGHTS}},
        {"ema": {"decay": 0.99, "shadow": [torch.ones(1)]}, "model": WEIGHTS},
        {f"module.{name}": tensor for name, tensor in WEIGHTS.items()},
        {"model": {f"_orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()}},
        {f"module._orig_mod.{name}": tensor for name, tensor in WEIGHTS.items()},
        {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_containers(tmp_path, content, zipped):
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "file.pth")
    same(found)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_safetensors_and_their_folder(tmp_path):
    save_tensors(tmp_path / "model.safetensors", WEIGHTS)
    same(read_checkpoint(tmp_path / "model.safetensors"))
    same(read_checkpoint(tmp_path))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"once upon a time\n" * 99, bytes(4096)])
def test_files_that_are_something_else(tmp_path, suffix, content):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(content)
    assert told(path).startswith(f"{path} is damaged or not a ")


def test_nothing_there(tmp_path):
    assert told(tmp_path / "none.pt") == f"{tmp_path / 'none.pt'} does not exist; expected a checkpoint there"
    assert told(tmp_path) == f"{tmp_path / 'model.safetensors'} does not exist; expected a checkpoint there"
    (tmp_path / "folder.pt").mkdir()
    assert "does not exist; expected a checkpoint there" in told(tmp_path / "folder.pt")


def test_no_state_dict(tmp_path):
    torch.save({"epoch": 3, "optimizer": [1, 2]}, tmp_path / "file.pt")
    assert told(tmp_path / "file.pt") == (
        f"{tmp_path / 'file.pt'} holds no state dict; expected tensors by name, or a dictionary with one under "
        "ema, model_ema, model, state_dict, module"
    )
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    assert "holds no state dict" in told(tmp_path / "tensor.pt")


def _bytes_of(kind):
    buffer = io.BytesIO()
    if kind == "safetensors":
        from safetensors.torch import save

        return save(WEIGHTS)
    content = {"model": WEIGHTS, "args": argparse.Namespace(lr=0.1)} if kind == "namespace" else {"model": WEIGHTS}
    torch.save(content, buffer, _use_new_zipfile_serialization=kind != "old")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "namespace", "old", "safetensors"])
def test_truncated_anywhere(tmp_path, kind):
    whole = _bytes_of(kind)
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pt")
    for length in [*range(0, 64, 7), *range(64, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert told(path).startswith(str(path)), length


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["zip", "namespace", "old", "safetensors"]), st.integers(0, 2**32 - 1))
def test_flipped_bits_are_an_error_or_harmless(tmp_path_factory, kind, seed):
    """Zip files have checksums: what can be read is what was written. The others cannot tell, but must not crash."""
    whole = bytearray(_bytes_of(kind))
    place = random.Random(seed).randrange(len(whole) * 8)
    whole[place // 8] ^= 1 << place % 8
    suffix = "safetensors" if kind == "safetensors" else "pt"
    path = tmp_path_factory.mktemp("flip") / f"file.{suffix}"
    path.write_bytes(whole)
    try:
        found = read_checkpoint(path)
    except UserError as error:
        assert str(error).startswith(str(path))  # noqa: PT017
        return
    if kind in ("zip", "namespace"):
        same(found)
