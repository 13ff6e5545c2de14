import numpy as np
import pytest
import torch

from smalti.core.data.loader import Batch
from smalti.core.errors import UserError
from smalti.core.random_networks import TEXT_TOKENS, WIDTH, RandomNetworks
from smalti.core.training.options import Text
from smalti.core.training.text import TextFeatures


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a tiny text encoder."""
    pytest.importorskip("transformers")
    return RandomNetworks(tmp_path_factory.mktemp("random"), lambda sentence: None).text_encoder()


def batch(*texts):
    return Batch(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), ["k0", "k1"], texts)


def test_texts_are_cut_filled_up_and_not_masked(clip):
    features = TextFeatures(Text(encoder=clip))
    encoder = features.encoder.network
    made = features(batch("a", "a photo of a very long dog"), ())
    assert made.shape == (2, TEXT_TOKENS, WIDTH)
    assert not made.requires_grad
    begin, end = encoder.tower.config.bos_token_id, encoder.tower.config.eos_token_id
    letter = encoder.tokens.convert_tokens_to_ids("a</w>")
    tokens = torch.tensor([[begin, letter, end] + [0] * (TEXT_TOKENS - 3)])
    torch.testing.assert_close(made[:1], encoder.tower(input_ids=tokens).last_hidden_state)
    same = features(batch("a photo of a very long cat", "a photo of a very long dog"), ())
    torch.testing.assert_close(same[0], same[1])  # they differ only where they are cut off
    assert not features.state_dict()


def test_images_without_a_text_have_that_of_their_class(clip):
    features = TextFeatures(Text(encoder=clip, of_class="a {}."))
    torch.testing.assert_close(features(batch(), ["cat", "dog"]), features(batch("a cat.", "a dog."), ()))
    torch.testing.assert_close(features(batch(None, "b"), ["cat", "dog"]), features(batch("a cat.", "b"), ()))


def test_features_are_taken_as_they_are():
    rows = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    assert torch.equal(TextFeatures(Text())(batch(*rows), ()), torch.from_numpy(rows))


def test_texts_that_cannot_be_had(clip, tmp_path):
    with pytest.raises(UserError) as raised:
        TextFeatures(Text(encoder=clip))(batch("a", None), ["cat", "dog"])
    assert str(raised.value) == (
        "image 'k1' has no text: give the data set's option text, or text.of_class, a sentence with {} for the name "
        "of its class"
    )
    with pytest.raises(UserError, match=r"^the text 'a' is no features of one: give text.encoder, e.g. openai/clip-"):
        TextFeatures(Text())(batch("a", "b"), ())
    shapes = np.zeros((1, 2), np.float32), np.zeros((3, 2), np.float32)
    with pytest.raises(UserError, match=r"^the texts of one batch have features of the shapes \(1, 2\), \(3, 2\)$"):
        TextFeatures(Text())(batch(*shapes), ())
    with pytest.raises(UserError, match=rf"^the text encoder {tmp_path} is a folder, without a CLIP of transformers "):
        TextFeatures(Text(encoder=str(tmp_path)))
