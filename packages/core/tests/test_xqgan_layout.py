import pytest
import torch

from smalti.core.checkpoints.importing import configured
from smalti.core.checkpoints.layouts.fqgan import FQGAN, FQGANWithFeatureHeads
from smalti.core.checkpoints.layouts.xqgan_quantizer import branches_of, quantizer_config, quantizer_rules
from smalti.core.checkpoints.layouts.xqgan_vit import XQGANViT
from smalti.core.checkpoints.rules import to_ours, to_published
from smalti.core.errors import UserError

CODES, BITS = {"embedding.weight": (64, 8)}, {"scaler": (10,)}
PHI = {
    4: {f"quant_resi.qresi_ls.{number}.{part}": (8,) for number in range(4) for part in ("weight", "bias")},
    1: {f"quant_resi.qresi.{part}": (8,) for part in ("weight", "bias")},
    10: {f"quant_resi.{number}.{part}": (8,) for number in range(10) for part in ("weight", "bias")},
    0: {},
}


def entries(*parts, prefix="quantize"):
    return {f"{prefix}.{name}": shape for part in parts for name, shape in part.items()}


@pytest.mark.parametrize("phi", PHI)
@pytest.mark.parametrize("kind", [CODES, BITS])
def test_scales_bits_and_phi_are_seen(phi, kind):
    shapes = entries(kind, PHI[phi], {"ema_vocab_hit_SV": (10, 64)})
    config = quantizer_config(shapes, 8, 11)
    assert config["scales"] == [1, 1, 2, 3, 3, 4, 5, 6, 8, 11]
    assert config["phi"] == phi
    assert config["quantizer"]["name"] == ("bsq" if kind is BITS else "vq")
    assert config["normalise"] == (kind is BITS)
    assert config["commitment_weight"] == (0.25 if kind is BITS else 2.5)
    weights = {name: torch.zeros(shape) for name, shape in entries(CODES if kind is CODES else {}, PHI[phi]).items()}
    ours, unknown = to_ours(quantizer_rules(config), weights)
    assert unknown == []
    names = {f"quantizer.phi.{number}.convolution.{part}" for number in range(phi) for part in ("weight", "bias")}
    assert ours.keys() == names | ({"quantizer.units.0.codebook"} if kind is CODES else set())


def test_one_scale_is_a_plain_codebook():
    config = quantizer_config(entries(CODES, {"ema_vocab_hit_SV": (64,)}), 8, 16)
    assert config == {"name": "vq", "dim": 8, "codebook_size": 64, "cosine": True}
    published = {"quantize.embedding.weight": torch.zeros(64, 8)}
    ours, _ = to_ours(quantizer_rules(config), published)
    assert ours.keys() == {"quantizer.codebook"}
    assert to_published(quantizer_rules(config), ours)[0].keys() == published.keys()


def test_branches_are_a_product():
    hits = {"ema_vocab_hit_SV": (64,)}
    shapes = {
        name: shape for branch in range(3) for name, shape in entries(CODES, hits, prefix=f"quantizes.{branch}").items()
    }
    assert branches_of(shapes) == 3
    config = quantizer_config(shapes, 8, 16)
    assert (config["name"], config["branches"], len(config["quantizers"])) == ("product", 3, 1)
    ours, unknown = to_ours(quantizer_rules(config), {"quantizes.2.embedding.weight": torch.zeros(64, 8)})
    assert (list(ours), unknown) == (["quantizer.units.2.codebook"], [])


def test_changing_one_configuration_leaves_the_next_alone():
    shapes = entries(CODES, PHI[4], {"ema_vocab_hit_SV": (10, 64)})
    quantizer_config(shapes, 8, 16)["scales"][0] = 99
    assert quantizer_config(shapes, 8, 16)["scales"][0] == 1


def test_unpublished_scales_have_to_be_given():
    assert "scales" not in quantizer_config(entries(CODES, PHI[4], {"ema_vocab_hit_SV": (7, 64)}), 8, 16)


def test_a_missing_entry_is_named():
    with pytest.raises(UserError, match=r"^the weights lack quant_conv.weight, without which the layout xqgan-vit"):
        configured(XQGANViT(), {"encoder.latent_tokens": (1, 256, 8)})


def test_feature_heads_are_read_only_on_request():
    shapes = {"quant_conv_vis.weight": (8, 256, 1, 1), "encoder.visual_head.0.positional_embedding": (256, 512)}
    assert FQGAN().recognises(shapes)
    assert not FQGANWithFeatureHeads().recognises(shapes)
    for name in ("feat_pred_head.ln_pre.weight", "mid_sem_feat_pred.ln_pre.bias", "high_sem_feat_pred.upscale.0.bias"):
        assert FQGAN().is_ignored(name)
        assert not FQGANWithFeatureHeads().is_ignored(name)
    assert FQGANWithFeatureHeads().is_ignored("quantize_vis.codebook_used")
