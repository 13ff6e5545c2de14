"""Importing and exporting through a small layout of the toy plugin."""

import pytest
import torch

from smalti.core.checkpoints import importing
from smalti.core.checkpoints.importing import export_checkpoint, export_file, import_checkpoint, import_recognised
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.recipe import load_recipe


@pytest.fixture
def tokenizer(recipe):
    torch.manual_seed(0)
    return load_recipe(recipe).tokenizer.build().eval()


@pytest.fixture
def published(tokenizer):
    """Its state dict as the toy's publisher would have written it."""
    return export_checkpoint(tokenizer, "toy")


def told(source, *arguments, **options):
    with pytest.raises(UserError) as caught:
        import_checkpoint(source, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_there_and_back(tokenizer, published):
    assert published["toy.enc.4.weight"].shape == (8, 1, 4, 4)  # our layer 0: they count from the end
    assert published["pre.weight"].shape == (4, 8, 1, 1)
    found, layout = import_recognised(published)
    assert layout == "toy"
    assert not found.training
    ours = tokenizer.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in found.state_dict().items())
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert torch.equal(found.encode(images), tokenizer.encode(images))


def test_statistics_are_left_out_and_dtypes_become_ours(published):
    halved = {name: tensor.half() for name, tensor in published.items()}
    found = import_checkpoint({**halved, "steps_seen": torch.tensor(3), "loss.discriminator.weight": torch.ones(2)})
    assert {tensor.dtype for tensor in found.state_dict().values()} == {torch.float32}


def test_the_file_is_left_as_it_is(published):
    before = {name: tensor.clone() for name, tensor in published.items()}
    found = import_checkpoint(published)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in published.items())


def test_options_that_the_file_cannot_tell(published):
    found = import_checkpoint(published, "toy", ["preprocessing.image_size=16", "preprocessing.fit=pad"])
    assert (found.preprocessing.image_size, found.preprocessing.fit) == (16, "pad")
    assert told(published, "toy", ["preprocessing.nosuch=1"]) == (
        "the configuration cannot be used: options.preprocessing.nosuch: no such option"
    )
    assert told(published, "toy", ["pad"]) == "'pad' is not an override: expected dotted.path=value"


def test_the_publishers_configuration_in_a_folder(tokenizer, tmp_path, monkeypatch):
    layout = registry().load("checkpoint", "toy")
    export_file(tokenizer, "toy", tmp_path / "toy" / "model.safetensors")
    monkeypatch.setattr(layout, "overrides", lambda _, content: [f"preprocessing.image_size={content['crop']}"])
    (tmp_path / "toy" / "config.json").write_text('{"crop": 32}')
    assert import_checkpoint(tmp_path / "toy").preprocessing.image_size == 32
    found = import_checkpoint(tmp_path / "toy", overrides=["preprocessing.image_size=16"])
    assert found.preprocessing.image_size == 16
    (tmp_path / "toy" / "config.json").write_text("{")
    assert "config.json is damaged, expected the publisher's configuration" in told(tmp_path / "toy")


def test_unknown_weights_name_what_is_known():
    known = ", ".join(registry().names("checkpoint"))
    assert told({"a": torch.ones(1), "b": torch.ones(1)}) == (
        f"the state dict is of no known layout, it has 2 entries (a, b); known: {known}"
    )


def test_weights_of_several_layouts(published, monkeypatch):
    twins = [
        registry().load("checkpoint", "toy")(),
        type("Twin", (registry().load("checkpoint", "toy"),), {"name": "twin"})(),
    ]
    monkeypatch.setattr(importing, "layouts", lambda: twins)
    assert told(published) == "the state dict may be of any of the layouts toy, twin: say which one"


def test_an_unknown_layout(published):
    assert told(published, "mosaic").startswith("unknown checkpoint 'mosaic'; installed: ")


def test_missing_unexpected_and_misshapen_entries_are_named(published):
    del published["toy.enc.4.bias"]
    published["surplus.weight"] = torch.ones(1)
    published["post.bias"] = torch.ones(3)
    assert told(published) == (
        "the state dict is not a whole checkpoint of the layout toy: unexpected surplus.weight; "
        "missing encoder.layers.0.bias; from_codes.bias is (3,), should be (8,)"
    )


def test_long_lists_are_cut(published):
    for number in range(20):
        published[f"surplus.{number:02d}"] = torch.ones(1)
    expected = ", ".join(f"surplus.{number:02d}" for number in range(8))
    assert told(published).endswith(f"the layout toy: unexpected {expected} and 12 more")


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("toy.dec.7.weight", None, "the weights lack toy.dec.7.weight, without which the layout toy cannot be"),
        ("toy.dec.7.weight", torch.tensor(1.0), "these shapes cannot be those of weights of the layout toy"),
        ("toy.enc.4.weight", torch.ones(7, 1, 4, 4), "options.encoder: width 7 cannot be divided into 2 "),
        ("toy.enc.4.weight", torch.ones(0, 1, 4, 4), "options.encoder.widths.0: Input should be greater than"),
    ],
)
def test_half_of_a_checkpoint(published, name, tensor, sentence):
    del published[name]
    if tensor is not None:
        published[name] = tensor
    assert sentence in told(published)


def test_a_layout_that_stumbles_over_strange_shapes_does_not_know_them(published):
    published["pre.weight"] = torch.tensor(1.0)
    assert "is of no known layout" in told(published)


def test_export_refuses_what_a_layout_cannot_hold(tokenizer):
    tokenizer.register_buffer("statistics", torch.zeros(1))
    with pytest.raises(UserError, match="cannot be written in the layout toy: it has no place for statistics"):
        export_checkpoint(tokenizer, "toy")


def test_export_refuses_what_an_import_would_not_take(tokenizer, published, monkeypatch):
    layout = registry().load("checkpoint", "toy")

    def refused():
        with pytest.raises(UserError) as caught:
            export_checkpoint(tokenizer, "toy")
        return str(caught.value).removeprefix("this tokenizer cannot be written in the layout toy: ")

    def of_others(_, config):
        return iter(config["options"]["preprocessing"]["channels"])

    with monkeypatch.context() as patch:
        patch.setattr(layout, "rules", of_others)
        assert refused() == "it is made of other parts"
    config = layout().config({name: tuple(tensor.shape) for name, tensor in published.items()})
    with monkeypatch.context() as patch:
        config["options"]["encoder"]["groups"] = 3
        patch.setattr(layout, "config", lambda *_: config)
        expected = "encoder: width 8 cannot be divided into 3 normalisation groups"
        assert refused().startswith(f"an import would be refused, {expected}")
    monkeypatch.setattr(layout, "config", lambda _, shapes: shapes["steps_seen"])
    assert refused() == "the weights lack steps_seen, without which the layout toy cannot be"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin", ".ckpt"])
def test_files_there_and_back(tokenizer, tmp_path, suffix):
    path = tmp_path / f"toy{suffix}"
    assert export_file(tokenizer, "toy", path) == len(tokenizer.state_dict())
    if suffix != ".safetensors":
        assert list(torch.load(path, weights_only=True)) == ["model"]
    found = import_checkpoint(path)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in tokenizer.state_dict().items())


def test_other_suffixes_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError) as caught:
        export_file(tokenizer, "toy", tmp_path / "toy.zip")
    assert str(caught.value) == f"{tmp_path / 'toy.zip'} must end in .safetensors, .pt, .pth, .bin or .ckpt"
    assert list(tmp_path.iterdir()) == [tmp_path / "images.tar", tmp_path / "toy.yaml"]


def test_what_is_imported_can_be_saved(published, tmp_path):
    import_checkpoint(published).save_pretrained(tmp_path / "saved")
    found = Tokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(found.state_dict()["to_codes.weight"], published["pre.weight"][:, :, 0, 0])


def test_shapes_of_which_no_module_can_be_made(published, monkeypatch):
    def fail(_):
        raise RuntimeError("negative dimension")

    monkeypatch.setattr(Tokenizer, "from_config", fail)
    assert told(published) == "no tokenizer can be built from the state dict, read as toy: negative dimension"


def test_every_layout_says_what_it_is():
    for name in registry().names("checkpoint"):
        layout = registry().load("checkpoint", name)()
        assert layout.name == name
        assert not layout.recognises({})
        assert not layout.recognises({"weight": ()})
