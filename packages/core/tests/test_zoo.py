"""The tables of published models, and models by their names there."""

import json
import socket
from pathlib import Path

import huggingface_hub
import pytest
import torch

from smalti.core.checkpoints import zoo as zoo_module
from smalti.core.checkpoints.importing import export_file
from smalti.core.checkpoints.zoo import fetch, read_table, zoo, zoo_model
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.recipe import load_recipe


@pytest.fixture(autouse=True)
def fresh():
    zoo.cache_clear()
    yield
    zoo.cache_clear()


@pytest.fixture
def tokenizer(recipe):
    torch.manual_seed(0)
    return load_recipe(recipe).tokenizer.build().eval()


def told(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


@pytest.fixture
def hub(tokenizer, tmp_path, monkeypatch):
    """The hub, with what the toy's publisher put there; says what was asked for."""
    asked = []
    export_file(tokenizer, "toy", tmp_path / "hub" / "toy.pt")

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / "hub" / "toy.pt")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(zoo_module, "_look_up_hub", lambda: None)
    return asked


@pytest.fixture
def offline(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(zoo_module, "getproxies", dict)
    monkeypatch.setattr(zoo_module.socket, "getaddrinfo", unknown)


def test_the_five_systems_and_the_others_are_there():
    counts = {}
    for model in zoo().values():
        counts.setdefault((model.system, model.kind), []).append(model.name)
    assert len(counts["GaussianToken", "tokenizer"]) == 2
    assert len(counts["FQGAN", "tokenizer"]) == 4
    assert len(counts["LlamaGen", "tokenizer"]) == 3
    assert len(counts["LlamaGen", "generator"]) == 9
    assert counts["VAR", "tokenizer"] == ["var-vqvae", "var-vqvae-512"]
    assert len(counts["VAR", "generator"]) == 5
    assert len(counts["TiTok", "tokenizer"]) == 6
    assert len(counts["TiTok", "autoencoder"]) == 3
    assert len(counts["TiTok", "generator"]) == 3
    assert len(counts["RAR", "generator"]) == 4
    assert counts["MaskGIT-VQGAN", "tokenizer"] == ["maskgit-vqgan"]
    assert len(counts["Open-MAGVIT2", "tokenizer"]) == 5
    assert len(counts["IBQ", "tokenizer"]) == 6
    names = [name for name in zoo() if name.startswith("xqgan-")]
    assert (
        sorted(name.split("-")[1] for name in names) == ["msbr10p2"] * 2 + ["msvr10p2"] * 5 + ["vp"] * 2 + ["vp2"] * 2
    )
    assert len(counts["visual-tokenizer-pytorch", "tokenizer"]) == 42


def test_what_tables_say_hangs_together():
    for model in zoo().values():
        assert all(figure.protocol for figure in model.figures), model.name
        assert model.latents is None or model.tokens is None, model.name
        if model.tokenizer is not None:
            tokenizer = zoo()[model.tokenizer]
            assert model.kind == "generator"
            assert tokenizer.kind in ("tokenizer", "autoencoder")
            if model.tokens is not None and "sub-tokens" not in model.note:
                assert tokenizer.tokens.vocab == model.tokens.vocab, model.name
        if model.hub is not None:
            assert model.hub.count("/") == 1, model.name
        if model.published is False:
            assert model.file is None or model.hub is None, model.name
            assert model.note, model.name


def test_every_layout_has_a_model():
    """A layout without a model in the zoo would be one that nobody can find."""
    unpublished = {"fqgan-with-feature-heads", "taming-vqgan", "vistok-vit-vqgan", "xqgan-cnn"}
    assert set(registry().names("checkpoint")) <= {model.layout for model in zoo().values()} | unpublished


def test_by_name(tokenizer, hub):
    found = Tokenizer.from_pretrained("toy-signs")
    assert hub == [("somebody/toy", "weights/toy.pt")]
    assert found.preprocessing.fit == "pad"  # an override of the table
    assert all(torch.equal(tensor, tokenizer.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_a_cached_file_needs_no_network(tokenizer, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "hub" / "toy.pt"))
    assert Tokenizer.from_pretrained("toy-signs").options.name == "composed"
    assert hub == []


def test_a_folder_goes_before_the_zoo(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("toy-signs")
    assert torch.equal(
        Tokenizer.from_pretrained("toy-signs").state_dict()["to_codes.bias"], tokenizer.state_dict()["to_codes.bias"]
    )


def test_another_kind(hub):
    assert told(Generator.from_pretrained, "toy-signs") == "toy-signs is a tokenizer, not a generator"
    assert told(Tokenizer.from_pretrained, "toy-table") == "toy-table is a generator, not a tokenizer"
    assert hub == []


def test_a_name_that_is_nothing():
    assert told(Tokenizer.from_pretrained, "toy-sings") == (
        f"toy-sings is neither a folder here nor a hub name owner/repository, and no model 'toy-sings' in the zoo: "
        f"`smalti zoo` lists its {len(zoo())} models; did you mean 'toy-signs'?"
    )


def test_without_network(offline):
    assert told(Tokenizer.from_pretrained, "toy-signs") == (
        "toy-signs could not be fetched (gaierror): download "
        "https://huggingface.co/somebody/toy/resolve/main/weights/toy.pt, then run "
        "`smalti import toy.pt --as toy --set preprocessing.fit=pad --out toy-signs`"
    )


def test_a_repository_that_refuses(hub, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*_):
        raise LocalEntryNotFoundError("nothing cached")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert told(fetch, zoo_model("toy-signs")).startswith("toy-signs could not be fetched (LocalEntryNotFoundError): ")


def test_no_known_address():
    assert told(Tokenizer.from_pretrained, "toy-elsewhere") == (
        "toy-elsewhere has no known address: download toy.ckpt from where https://example.org/toy says, "
        "then run `smalti import toy.ckpt --as toy --out toy-elsewhere`"
    )


def test_unpublished_weights():
    assert told(Tokenizer.from_pretrained, "toy-unpublished") == (
        "the weights of toy-unpublished are not published; nobody has them"
    )


def test_status():
    states = {name: zoo_model(f"toy-{name}").status for name in ("signs", "unpublished", "table")}
    assert states == {
        "signs": "importable",
        "unpublished": "not published",
        "table": "missing: layout 'mosaic'",
    }


def test_protocols_are_spelt_out():
    (figure,) = zoo_model("toy-signs").figures
    assert (figure.name, figure.value, figure.protocol) == ("rFID", 1.5, "24 grey images")


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("models: [", "is not readable YAML: "),
        ("models: [{name: 2020-13-45}]", "is not readable YAML: month must be in 1..12"),
        ("models: 3", "is not a zoo table: models: Input should be a valid list, got 3"),
        ("nothing: []\nmodels: []", "is not a zoo table: nothing: no such option"),
        ("models: [{name: a, system: s, kind: mosaic, layout: l, home: h}]", ", model 'a': kind: Input should be "),
        ("models: [{name: A b, system: s, kind: tokenizer, layout: l, home: h}]", ", model 'A b': name: "),
        (
            "models: [{name: a, system: s, kind: tokenizer, layout: l, home: h, figures: "
            "[{name: FID, value: 1, protocol: nowhere}]}]",
            ", model 'a': no protocol 'nowhere' in the table",
        ),
    ],
)
def test_wrong_tables(tmp_path, table, sentence):
    path = tmp_path / "table.yaml"
    path.write_text(table)
    assert told(read_table, path).startswith(f"{path}")
    assert sentence in told(read_table, path)


def test_two_models_of_one_name(tmp_path, monkeypatch):
    import toy_zoo

    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "twice.yaml").write_text((Path(toy_zoo.__path__[0]) / "toy.yaml").read_text())
    monkeypatch.setattr(toy_zoo, "__path__", [*toy_zoo.__path__, str(folder)])
    assert told(zoo) == f"the zoo has two models called 'toy-signs', one of them in {folder / 'twice.yaml'}"


def test_the_list_on_the_command_line(smalti):
    lines = smalti("zoo", check=True).stdout.splitlines()
    assert len(lines) == len(zoo())
    (line,) = [line for line in lines if line.startswith("toy-signs ")]
    assert line == "toy-signs  Toy  tokenizer  grid 2x2, 16  0.00356 M  rFID 1.5  importable"


def test_one_model_on_the_command_line(smalti):
    text = smalti("zoo", "toy-signs", check=True).stdout
    for line in (
        "licence     code MIT, weights not stated",
        "tokens      grid 2x2, 1 stream of 16 codes",
        "figure      rFID 1.5: 24 grey images",
        "download    https://huggingface.co/somebody/toy/resolve/main/weights/toy.pt",
        "import      smalti import toy-signs --out toy-signs",
    ):
        assert line in text.splitlines()
    text = smalti("zoo", "toy-table", check=True).stdout
    assert text.splitlines()[-1] == "import      not possible: nothing that is installed reads this layout"
    assert smalti("zoo", "mosaic").stderr.startswith("smalti: no model 'mosaic' in the zoo: ")


def test_a_layout_that_nothing_reads_is_told_before_the_download():
    with pytest.raises(UserError) as told:
        fetch(zoo_model("toy-table"))
    assert str(told.value) == (
        "toy-table is listed, but cannot be imported: nothing that is installed reads its layout 'mosaic'"
    )


def test_machine_readable(smalti):
    models = {model["name"]: model for model in json.loads(smalti("zoo", "--json", check=True).stdout)}
    assert models.keys() == zoo().keys()
    assert models["toy-signs"]["url"] == "https://huggingface.co/somebody/toy/resolve/main/weights/toy.pt"
    assert models["toy-table"]["status"] == "missing: layout 'mosaic'"
    assert json.loads(smalti("zoo", "--json", "toy-signs", check=True).stdout) == models["toy-signs"]


def test_the_list_needs_no_torch(smalti, tmp_path):
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    assert "toy-signs" in smalti("zoo", check=True, PYTHONPATH=f"{tmp_path}:{Path(__file__).parent / 'toy'}").stdout
