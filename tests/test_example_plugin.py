"""The example distribution in the whole pipeline: a stranger's tokenizer needs nothing but its entry point."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_a_third_party_tokenizer_goes_all_the_way(smalti, shrunk):
    overrides = [one for one in shrunk if not one.startswith("tokenizer.")]
    tokenizer = "{name: example-patches, preprocessing: {image_size: 32, channels: 1, fit: pad}, patch: 4, levels: 3}"
    smalti("run", "quickstart", f"tokenizer={tokenizer}", *overrides, "--out", "run")
    run = smalti.folder / "run"
    config = json.loads((run / "tokenizer" / "config.json").read_text())
    assert config["options"]["name"] == "example-patches"
    layout = json.loads((run / "tokens" / "layout.json").read_text())["layout"]
    assert layout == {"kind": "grid", "shape": [[8, 8]], "vocab": [81]}
    assert json.loads((run / "summary.json").read_text())["psnr"] > 5


def test_it_is_listed_and_can_be_blocked(smalti):
    stdout, _ = smalti("plugins")
    assert "smalti-example-tokenizer 0.1.0: loaded" in stdout
    assert "example-patches" in stdout
    smalti.environment["SMALTI_PLUGINS"] = "-example-tokenizer"
    stdout, _ = smalti("plugins")
    assert "smalti-example-tokenizer 0.1.0: blocked" in stdout
    _, stderr = smalti("run", "quickstart", "tokenizer.name=example-patches", code=2)
    assert "unknown tokenizer 'example-patches'; installed: composed" in stderr
