import pytest
import torch

from smalti.core.autoencoder import Autoencoder
from smalti.core.checkpoints.importing import configured, export_checkpoint, import_checkpoint, recognised
from smalti.core.checkpoints.layouts.titok import TiTokLayout
from smalti.core.errors import UserError
from smalti.core.files import write_json
from smalti.core.weights import save_tensors


def half(prefix, width, layers, tokens):
    shapes = {
        "class_embedding": (1, width),
        "positional_embedding": (1 + 6 * 6, width),
        "latent_token_positional_embedding": (tokens, width),
    }
    for name in (
        "ln_pre",
        "ln_post",
        *(f"transformer.{layer}.ln_{norm}" for layer in range(layers) for norm in (1, 2)),
    ):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for layer in range(layers):
        shapes[f"transformer.{layer}.attn.in_proj_weight"] = (3 * width, width)
        shapes[f"transformer.{layer}.attn.in_proj_bias"] = (3 * width,)
        for name, outputs, inputs in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes[f"transformer.{layer}.{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"transformer.{layer}.{name}.bias"] = (outputs * width,)
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def published(*, kl=True, text=False, legacy=False):
    """Shapes of a small TiTok: widths 128 and 64, 2 and 1 layers, 5 tokens, codes of 3, patches of 2."""
    shapes = {
        "latent_tokens": (5, 128),
        **half("encoder", 128, 2, 5),
        "encoder.patch_embed.weight": (128, 3, 2, 2),
        "encoder.patch_embed.bias": (128,),
        "encoder.conv_out.weight": (6 if kl else 3, 128, 1, 1),
        "encoder.conv_out.bias": (6 if kl else 3,),
        **half("decoder", 64, 1, 5),
        "decoder.mask_token": (1, 1, 64),
        "decoder.decoder_embed.weight": (64, 3),
        "decoder.decoder_embed.bias": (64,),
    }
    if text:
        shapes |= {"decoder.text_guidance_proj.weight": (64, 9), "decoder.text_guidance_proj.bias": (64,)}
        shapes["decoder.text_guidance_positional_embedding"] = (4, 64)
    layers = [("ffn.0", 128, 64, 1), ("ffn.2", 7, 128, 1)] if legacy else [("ffn.0", 12, 64, 1), ("conv_out", 3, 3, 3)]
    for name, outputs, inputs, side in layers:
        shapes |= {f"decoder.{name}.weight": (outputs, inputs, side, side), f"decoder.{name}.bias": (outputs,)}
    if not kl:
        shapes["quantize.embedding.weight"] = (11, 3)
    return shapes


def filled(shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("text", [False, True])
def test_import_and_export(text):
    weights = filled(published(text=text))
    model = import_checkpoint(weights)
    assert isinstance(model, Autoencoder)
    assert not model.training
    assert model.options.decoder.name == ("text-titok" if text else "titok")
    encoder, decoder = model.options.encoder, model.options.decoder
    assert (encoder.width, encoder.layers, encoder.heads, encoder.tokens, encoder.patch) == (128, 2, 2, 5, 2)
    assert (decoder.width, decoder.layers, decoder.heads, decoder.grid) == (64, 1, 1, (6, 6))
    assert (decoder.head.name, decoder.head.patch) == ("pixels", 2)
    assert (model.width, model.latent_space()) == (3, (5,))
    with torch.no_grad():
        latents = model.encode(torch.zeros(1, 3, 12, 12))
        assert model.decode(latents, **({"text": torch.zeros(1, 4, 9)} if text else {})).shape == (1, 3, 12, 12)
    exported = export_checkpoint(model, "titok")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in weights.items())


def test_what_shapes_tell_of_a_codebook():
    layout = TiTokLayout()
    for legacy in (False, True):
        shapes = published(kl=False, legacy=legacy)
        assert layout.recognises(shapes)
        options = configured(layout, shapes)["options"]
        assert options["quantizer"] == {"name": "vq", "dim": 3, "codebook_size": 11, "cosine": legacy}
        assert options["encoder"]["reread"] == legacy
    assert options["decoder"]["head"] == {"name": "logits", "codes": 7}  # of the first stage, no pixels yet


def test_the_published_configuration_tells_more():
    layout = TiTokLayout()
    model = {"quantize_mode": "vq", "use_l2_norm": True, "commitment_cost": 0.5, "num_latent_tokens": 5}
    overrides = layout.overrides({"model": {"vq_model": model}, "experiment": {}})
    quantizer = configured(layout, published(kl=False), overrides)["options"]["quantizer"]
    assert (quantizer["cosine"], quantizer["commitment_weight"]) == (True, 0.5)
    assert layout.overrides({"model": {"vq_model": model | {"quantize_mode": "vae"}}}) == []
    assert layout.overrides({}) == []


@pytest.mark.parametrize("config", [[], {"model": "titok"}, {"model": {"vq_model": 3}}])
def test_a_configuration_of_another_kind(tmp_path, config):
    save_tensors(tmp_path / "model.safetensors", filled(published()))
    write_json(tmp_path / "config.json", config)
    sentence = r"config\.json is not the configuration that belongs to the layout titok$"
    with pytest.raises(UserError, match=sentence):
        import_checkpoint(tmp_path)


def test_a_training_statistic_is_ignored_and_a_stranger_is_not():
    weights = filled(published())
    import_checkpoint(weights | {"quantize.embed_prob": torch.zeros(11)})
    with pytest.raises(UserError, match=r"not a whole checkpoint of the layout titok: unexpected encoder.head.weight"):
        import_checkpoint(weights | {"encoder.head.weight": torch.zeros(2)})
    del weights["decoder.transformer.0.mlp.c_proj.bias"]
    with pytest.raises(UserError, match=r"missing decoder.sequence.blocks.0.mlp.2.bias$"):
        import_checkpoint(weights)
    del weights["encoder.conv_out.weight"]
    with pytest.raises(UserError, match=r"^the weights lack encoder.conv_out.weight, without which"):
        import_checkpoint(weights)


def test_no_other_layout_claims_them():
    assert recognised(published(text=True)).name == "titok"
