"""`smalti import` and `smalti export`: a folder whole or not at all, and one sentence where it cannot be."""

import errno
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from smalti.core import files
from smalti.core.checkpoints.importing import export_checkpoint, export_file
from smalti.core.cli import app
from smalti.core.commands import models
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.recipe import load_recipe


@pytest.fixture
def tokenizer(recipe):
    torch.manual_seed(0)
    return load_recipe(recipe).tokenizer.build().eval()


@pytest.fixture
def file(tokenizer, tmp_path):
    export_file(tokenizer, "toy", tmp_path / "toy.pt")
    return tmp_path / "toy.pt"


def left(folder):
    """What lies there beside the inputs of the tests."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("images.tar", "toy.yaml", "toy.pt"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line in this process: arguments to the result."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_there_and_back(run, file, tokenizer, tmp_path):
    done = run("import", "toy.pt", "--set", "preprocessing.fit=pad", "--out", "ours")
    assert done.stdout.splitlines() == [
        "layout      toy",
        "kind        tokenizer",
        "tokens      grid 2x2, 1 stream of 16 codes",
        f"parameters  {sum(tensor.numel() for tensor in tokenizer.parameters()) / 1e6:.4g} M",
        "written     ours",
    ]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    assert Tokenizer.from_pretrained(tmp_path / "ours").options == tokenizer.options
    done = run("export", "ours", "--as", "toy", "--out", "back.pt")
    assert done.stdout == f"{len(tokenizer.state_dict())} entries written to back.pt\n"
    before, after = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("toy.pt", "back.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_same_file_same_bytes(run, file, tmp_path):
    for name in ("one", "two"):
        run("import", "toy.pt", "--as", "toy", "--out", name)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_averaged_weights_or_the_others(run, tokenizer, tmp_path):
    plain = export_checkpoint(tokenizer, "toy")
    torch.save({"ema": {name: tensor * 2 for name, tensor in plain.items()}, "model": plain}, tmp_path / "toy.pt")
    run("import", "toy.pt", "--out", "averaged")
    run("import", "toy.pt", "--no-ema", "--out", "plain")
    bias = tokenizer.state_dict()["encoder.layers.0.bias"]
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "averaged").state_dict()["encoder.layers.0.bias"], bias * 2)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "plain").state_dict()["encoder.layers.0.bias"], bias)


def test_one_line_and_exit_code_2(smalti, tmp_path):
    (tmp_path / "text.pt").write_text("once upon a time")
    done = smalti("import", "text.pt", "--out", "ours")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "smalti: text.pt is damaged or not a checkpoint of torch.save or safetensors\n"


def refused(run, folder, *arguments):
    """The sentence that a command ends with; it leaves nothing behind."""
    before = left(folder)
    done = run(*arguments)
    assert isinstance(done.exception, UserError)
    assert done.output == ""
    assert "\n" not in str(done.exception)
    assert left(folder) == before
    return str(done.exception)


def test_what_cannot_be_imported(run, file, tokenizer, tmp_path):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert refused(run, tmp_path, "import", "toy.pt", "--out", "ours") == (
        "toy.pt is damaged or not a checkpoint of torch.save or safetensors"
    )
    plain = export_checkpoint(tokenizer, "toy")
    del plain["toy.enc.3.conv1.weight"]
    torch.save({**plain, "surplus": torch.ones(1)}, file)
    assert refused(run, tmp_path, "import", "toy.pt", "--out", "deep/er/ours") == (
        "toy.pt is not a whole checkpoint of the layout toy: unexpected surplus; missing encoder.layers.1.conv1.weight"
    )
    assert refused(run, tmp_path, "import", "mosaic", "--out", "ours").startswith(
        "mosaic does not exist, and there is no model 'mosaic' in the zoo: "
    )


def test_a_folder_that_holds_something(run, file, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert refused(run, tmp_path, "import", "toy.pt", "--out", "ours") == (
        f"{tmp_path / 'ours'} exists already and is not empty: give another folder, or remove it first"
    )
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"
    (tmp_path / "ours" / "notes.txt").unlink()
    run("import", "toy.pt", "--out", "ours")


@pytest.mark.parametrize(
    ("code", "sentence"), [(errno.ENOSPC, "no disk space left to write "), (errno.EACCES, " cannot be written: ")]
)
def test_a_full_disk(file, tmp_path, monkeypatch, code, sentence):
    def full(_descriptor):
        raise OSError(code, "not now")

    monkeypatch.setattr(files.os, "fsync", full)
    before = left(tmp_path)
    with pytest.raises(UserError, match=sentence):
        models.import_model(str(file), tmp_path / "ours")
    assert left(tmp_path) == before


def test_an_interruption_leaves_nothing(file, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        models.import_model(str(file), tmp_path / "ours")
    assert left(tmp_path) == []


def test_what_a_killed_import_left_goes_with_the_next(run, file, tmp_path):
    (tmp_path / ".ours.part").mkdir()
    (tmp_path / ".ours.part" / "model.safetensors").write_text("half")
    run("import", "toy.pt", "--out", "ours")
    assert left(tmp_path) == ["ours"]


def test_what_cannot_be_exported(run, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "ours")
    assert refused(run, tmp_path, "export", "ours", "--as", "toy", "--out", "back.zip").startswith(
        "back.zip must end in .safetensors, "
    )
    assert refused(run, tmp_path, "export", "nowhere", "--as", "toy", "--out", "back.pt") == (
        f"{Path('nowhere') / 'config.json'} does not exist; expected the configuration of a saved model there"
    )
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps({**config, "kind": "mosaic"}))
    assert refused(run, tmp_path, "export", "ours", "--as", "toy", "--out", "back.pt") == (
        "'mosaic' is no kind of model; there are tokenizer, generator, autoencoder"
    )
