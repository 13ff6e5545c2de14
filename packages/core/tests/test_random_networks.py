"""Networks of random weights for copies of recipes."""

import pytest
import transformers

from smalti.core.random_networks import LETTERS, RandomNetworks


def test_a_folder_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    random = RandomNetworks(tmp_path / "random", lambda sentence: None)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.CLIPTokenizer, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            random.text_encoder()
    tokens = transformers.CLIPTokenizer.from_pretrained(random.text_encoder())
    assert tokens.convert_tokens_to_ids("a</w>") == len(LETTERS)
