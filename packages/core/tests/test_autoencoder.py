import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions

from smalti.core.autoencoder import Autoencoder, ComposedAutoencoderOptions, DiagonalGaussian
from smalti.core.backbones.cnn import CNNDecoderOptions, CNNEncoderOptions
from smalti.core.backbones.text_titok import TextTiTokDecoderOptions
from smalti.core.backbones.titok import TiTokDecoderOptions, TiTokEncoderOptions
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti.core.tokenizer import ComposedOptions

TINY = {"width": 24, "layers": 2, "heads": 2, "grid": (4, 4), "tokens": 8}
PARTS = {
    "preprocessing": Preprocessing(image_size=16),
    "encoder": TiTokEncoderOptions(**TINY, patch=4),
    "decoder": TiTokDecoderOptions(**TINY, head={"name": "pixels", "patch": 4}),
}
TEXT_DECODER = TextTiTokDecoderOptions(**TINY, head={"name": "pixels", "patch": 4}, text_tokens=5, text_width=6)
TEXT_PARTS = PARTS | {"decoder": TEXT_DECODER}
SEQUENCE = ComposedAutoencoderOptions(**PARTS, width=4, divergence_weight=0.5)
GRID = ComposedAutoencoderOptions(
    preprocessing=Preprocessing(image_size=16),
    encoder=CNNEncoderOptions(widths=(8, 8), blocks=1),
    decoder=CNNDecoderOptions(widths=(8, 8), blocks=1),
    width=3,
)
TEXT_AWARE = ComposedAutoencoderOptions(**TEXT_PARTS, width=4, divergence_weight=0.5)
ALL = pytest.mark.parametrize("options", [SEQUENCE, GRID, TEXT_AWARE], ids=["sequence", "grid", "text-aware"])


def images(batch=3):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


FEATURES = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2))


def text(batch=3):
    return FEATURES[:batch]


def built(options):
    torch.manual_seed(0)
    return options.build().eval()


def given_text(options, batch=3):
    return {"text": text(batch)} if options.decoder.name == "text-titok" else {}


@settings(deadline=None, max_examples=20)
@given(mean=st.floats(-5, 5), log_variance=st.floats(-8, 8))
def test_gaussian_by_definition(mean, log_variance):
    moments = torch.tensor([[[mean, -mean, log_variance, 0.5 * log_variance]]])
    posterior = DiagonalGaussian.from_moments(moments)
    expected = Normal(torch.tensor([mean, -mean]), (0.5 * moments[0, 0, 2:]).exp())
    torch.testing.assert_close(posterior.std[0, 0], expected.stddev)
    divergence = kl_divergence(expected, Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(posterior.divergence(), divergence.view(1, 1), rtol=1e-4, atol=1e-5)


def test_variances_stay_finite():
    posterior = DiagonalGaussian.from_moments(torch.tensor([[[0.0, 0.0, -1e9, 1e9]]]))
    assert posterior.log_variance.flatten().tolist() == [-30, 20]


def test_samples_have_the_moments():
    posterior = DiagonalGaussian(torch.full((20000, 1, 1), 2.0), torch.full((20000, 1, 1), 2.0))
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(2, abs=0.1)
    assert sample.std().item() == pytest.approx(torch.e, rel=0.05)


@ALL
def test_encode_gives_the_mean_or_a_sample(options):
    model = built(options)
    mean = model.encode(images())
    assert mean.shape == (3, *model.latent_space(), options.width)
    assert torch.equal(mean, model.posterior(images()).mean)
    assert not mean.requires_grad
    one, other, third = (model.encode(images(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one, mean + model.posterior(images()).std * noise)


@ALL
def test_decode_agrees_with_forward(options):
    model = built(options)
    with torch.no_grad():
        output = model(images(), **given_text(options))
    assert output.losses == {}
    decoded = model.decode(model.encode(images()), **given_text(options))
    torch.testing.assert_close(decoded, output.images.clamp(-1, 1))


@ALL
def test_training_samples_and_weighs_the_divergence(options):
    model = built(options).train()
    torch.manual_seed(0)
    output = model(images(), **given_text(options))
    expected = options.divergence_weight * output.posterior.divergence().sum() / 3
    torch.testing.assert_close(output.losses["divergence"], expected)
    again = model(images(), **given_text(options))
    assert not torch.equal(output.images, again.images)
    (output.images.square().mean() + output.losses["divergence"]).backward()
    assert all(weight.grad is not None for weight in model.parameters())


@ALL
def test_save_and_load(options, tmp_path):
    model = built(options)
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    assert loaded.options == options
    assert torch.equal(loaded.encode(images()), model.encode(images()))
    with pytest.raises(UserError, match="does not hold a tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@ALL
def test_a_sample_does_not_see_its_batch(options):
    model = built(options)
    singly = torch.cat([model.encode(image[None]) for image in images()])
    torch.testing.assert_close(model.encode(images()), singly, atol=1e-5, rtol=1e-4)


@ALL
def test_compiles_and_takes_bfloat16(options):
    model = built(options)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(images(), **given_text(options)).images
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images(), **given_text(options)).images, expected, atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(images(), **given_text(options)).images
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0.1)


@ALL
def test_wrong_inputs_are_told(options):
    model = built(options)
    with pytest.raises(UserError, match=r"^images must be float \(B, 3, H, W\)"):
        model.encode(torch.zeros(1, 4, 16, 16))
    sentence = rf"^latents must be float \(B, \*space, {options.width}\), got torch.float32 \(1, 8, 7\)$"
    with pytest.raises(UserError, match=sentence):
        model.decode(torch.zeros(1, 8, 7))


def test_an_image_size_that_the_encoder_cannot_take_is_told_at_once():
    options = SEQUENCE.model_copy(update={"preprocessing": Preprocessing(image_size=20)})
    with pytest.raises(UserError, match=r"^an image of 20x20 cannot be encoded: this encoder is for 16x16$"):
        options.build()


class TestTextAware(TokenizerContract):
    options = ComposedOptions(**TEXT_PARTS, quantizer=SignsOptions(dim=6))

    def context(self, batch):
        return {"text": FEATURES[:1].expand(batch, -1, -1)}


@pytest.mark.parametrize("options", [TestTextAware.options, TEXT_AWARE], ids=["tokenizer", "autoencoder"])
def test_the_text_matters_and_must_be_there(options):
    model = built(options)
    codes = model.encode(images())
    decoded = model.decode(codes, text=text())
    assert not torch.equal(decoded, model.decode(codes, text=-text()))
    with pytest.raises(UserError, match=r"^a text-aware decoder needs text features \(3, 5, 6\), got none$"):
        model.decode(codes)
    with pytest.raises(UserError, match=r"^a text-aware decoder needs text features \(3, 5, 6\), got \(2, 5, 6\)$"):
        model(images(), text=text(2))
