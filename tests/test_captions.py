"""Images of captions: a published text-conditional generator, a T5, a tokenizer, and the command that joins them."""

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from smalti.core.backbones.cnn import CNNDecoderOptions, CNNEncoderOptions
from smalti.core.captions import CaptionOptions
from smalti.core.checkpoints.importing import export_file
from smalti.core.cli import app
from smalti.core.contracts import Generator
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.text_encoder import caption_features
from smalti.core.tokenizer import ComposedOptions
from smalti.generation.ar import AROptions
from smalti.quant.vector import VectorQuantizerOptions

LENGTH, WIDTH = 6, 16
NETWORK = {"widths": [8, 8, 8], "blocks": 1, "groups": 2}
WORDS = ("a", "red", "blue", "cat", "dog", "and")


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """The folder of a tiny T5 that reads a few words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("t5")
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=WIDTH, d_kv=4, d_ff=32, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.T5EncoderModel(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, t5):
    """Folders of a generator that came in from its published layout, and of a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = ComposedOptions(
        preprocessing=Preprocessing(image_size=8),
        encoder=CNNEncoderOptions(**NETWORK),
        quantizer=VectorQuantizerOptions(dim=4, codebook_size=16),
        decoder=CNNDecoderOptions(**NETWORK),
    ).build()
    tokenizer.save_pretrained(folder / "tokenizer")
    captions = {"length": LENGTH, "width": WIDTH, "encoder": "google/flan-t5-xl"}
    generator = AROptions(layers=2, dim=32, heads=4, ffn_multiple=32, captions=captions).build(tokenizer.layout(), 1)
    torch.nn.init.normal_(generator.outputs[0].weight)
    export_file(generator, "llamagen-gpt-t2i", folder / "t2i.pt")
    changes = ("heads=4", "layout.shape=[[2, 2]]", f"captions.encoder={t5}")
    arguments = [part for change in changes for part in ("--set", change)]
    done = CliRunner().invoke(app, ["import", str(folder / "t2i.pt"), "--out", str(folder / "generator"), *arguments])
    assert done.exit_code == 0, done.exception
    return folder


@pytest.fixture
def sample(models, tmp_path):
    def sample(out, *arguments, generator="generator"):
        paths = ("--generator", models / generator, "--tokenizer", models / "tokenizer", "--out", tmp_path / out)
        return CliRunner().invoke(app, ["sample", *map(str, paths), *arguments])

    return sample


def test_features_are_those_of_the_encoder_alone_and_stand_at_the_end(t5):
    import transformers

    options = CaptionOptions(length=LENGTH, width=WIDTH, encoder=str(t5))
    texts = ["a cat", "a red dog and a blue cat"]
    found = caption_features(texts, options, None, "cpu")
    assert found.shape == (2, LENGTH, WIDTH)
    tower = transformers.T5EncoderModel.from_pretrained(t5)
    for row, codes in zip(found, ([3, 6, 1], [3, 4, 7, 8, 3, 1]), strict=True):
        with torch.no_grad():
            expected = tower(input_ids=torch.tensor([codes])).last_hidden_state[0]
        torch.testing.assert_close(row[-len(codes) :], expected)
        assert not row[: -len(codes)].any()
    assert torch.equal(found[1:], caption_features(texts[1:], options, None, "cpu"))


def test_the_published_layout_names_its_encoder(models):
    arguments = ["import", str(models / "t2i.pt"), "--out", str(models / "named")]
    done = CliRunner().invoke(app, [*arguments, "--set", "heads=4", "--set", "layout.shape=[[2, 2]]"])
    assert done.exit_code == 0, done.exception
    assert Generator.from_pretrained(models / "named").captions.encoder == "google/flan-t5-xl"


def test_prompts_become_images_whatever_the_batch_size(sample, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n\na blue dog and a cat\n")
    prompts = ("--prompts", str(tmp_path / "prompts.txt"), "sample.guidance_scale=3", "sample.per_class=2")
    found = []
    for size in (1, 4):
        done = sample(f"by-{size}", *prompts, f"sample.batch_size={size}", "sample.files=png", "--trace")
        assert done.exit_code == 0, done.exception
        with np.load(tmp_path / f"by-{size}" / "samples.npz") as archive:
            assert archive["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
            found.append(archive["arr_0"].astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1  # the decoder rounds, too
    assert len({image.tobytes() for image in found[0]}) > 3
    folder = tmp_path / "by-1"
    assert (folder / "prompts.txt").read_text().splitlines() == ["a cat", "a red dog", "a blue dog and a cat"]
    assert {path.name for path in (folder / "images").iterdir()} == {"0-a-cat", "1-a-red-dog", "2-a-blue-dog-and-a-cat"}
    assert (folder / "trace.gif").exists()
    assert sample("by-1", *prompts, "sample.batch_size=1", "sample.files=png").exit_code == 0
    told = sample("by-1", "--prompts", "a dog", "sample.per_class=2", "sample.batch_size=1", "sample.files=png")
    assert "holds other samples" in str(told.exception)


def test_captions_follow_the_text(sample, tmp_path):
    """Another text gives other images; the same one the same, whatever stands beside it."""
    images = {}
    for name, text in (("cat", "a cat"), ("dog", "a red dog")):
        assert sample(name, "--prompts", text, "sample.per_class=4", "sample.temperature=0").exit_code == 0
        with np.load(tmp_path / name / "samples.npz") as archive:
            images[name] = archive["arr_0"]
    assert (images["cat"] != images["dog"]).any()
    assert (images["cat"][0] == images["cat"][3]).all()  # without temperature nothing is left to chance


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "the generator 'ar' draws captions in the place of classes: give --generator, --tokenizer and --prompts"),
        (("--prompts", "a", "--classes", "0"), "the generator 'ar' draws captions, not classes: leave --classes out"),
    ],
)
def test_what_a_generator_of_captions_does_not_take(sample, arguments, sentence):
    assert str(sample("out", *arguments).exception) == sentence


def test_encoders_that_are_not_there_or_do_not_fit(sample, t5, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as told:
        raise sample("out", "--prompts", "a", "--text-encoder", str(tmp_path / "empty")).exception
    assert str(told.value).startswith(
        f"the text encoder {tmp_path / 'empty'} is a folder, without a T5 of transformers ("
    )
    assert str(told.value).endswith("): download it from the hub, and give its folder with --text-encoder")
    with pytest.raises(UserError, match=r"makes features 16 wide, the generator takes 2048$"):
        caption_features(["a"], CaptionOptions(), str(t5), "cpu")
    with pytest.raises(
        UserError, match=r"^the generator does not name the text encoder of its captions: give it with "
    ):
        caption_features(["a"], CaptionOptions(), None, "cpu")


def test_prompts_are_for_captions(sample, models):
    AROptions(layers=1, dim=16, heads=2).build(
        Generator.from_pretrained(models / "generator").token_layout, 3
    ).save_pretrained(models / "of-classes")
    told = sample("out", "--prompts", "a cat", generator="of-classes").exception
    assert str(told) == "the generator 'ar' draws classes, not captions: give --classes in the place of --prompts"
    told = CliRunner().invoke(app, ["sample", "quickstart", "--prompts", "a cat"]).exception
    assert str(told) == ("sample: --prompts and --text-encoder go with --generator and --tokenizer, not with a recipe")
