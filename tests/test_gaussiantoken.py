"""The tokenizer of 2-D Gaussians: whole tokens, and published files with raw and averaged weights."""

import re
from itertools import pairwise

import pytest
import torch

from smalti.core.checkpoints.importing import export_checkpoint, export_file, import_checkpoint
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout

CNN = {
    "name": "vqgan",
    "width": 32,
    "multipliers": [1, 2],
    "blocks": 1,
    "attention_levels": [],
    "middle_blocks": 1,
    "middle_attention": False,
    "bias": False,
}
EMBED = {"gaussians": 16, "width": 32, "operations": ["attention", "feed-forward", "refine"] * 2}
CODEBOOK = {"name": "vq", "dim": 4, "codebook_size": 32, "update": "ema", "ema_decay": 0.8, "initialise": "data"}
OPTIONS = {
    "name": "gaussiantoken",
    "preprocessing": {"image_size": 16, "fit": "native-crop"},
    "encoder": {**CNN, "latent_width": 8, "downsampling": "symmetric", "last_kernel": 1},
    "embed": EMBED,
    "quantizer": {**CODEBOOK, "estimator": "rotation", "revive_below": 2.0},
    "decoder": {**CNN, "latent_width": 4, "upsampling": "shuffle", "adaptive": True},
}


def tokenizer(**changes):
    torch.manual_seed(0)
    return Tokenizer.from_config({"kind": "tokenizer", "options": {**OPTIONS, **changes}})


def trained(**changes):
    """Weights and statistics that are not those of the beginning."""
    model = tokenizer(**changes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(3):
        output = model(images())
        optimizer.zero_grad()
        (output.images - images()).square().mean().add(sum(output.losses.values())).backward()
        optimizer.step()
    return model.eval()


def images():
    coarse = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


def averaged(published):
    """A published file's entries, with averages that are not the weights."""
    kept = ("quantize._codebook.", "gs_embed.gaussian_lifter.instance_feature")
    weights = {
        name: tensor
        for name, tensor in published.items()
        if not name.startswith(kept) and not name.endswith(("fixed_offsets", "current_range_max"))
    }
    averages = {f"model_ema.{name.replace('.', '')}": 1.1 * tensor for name, tensor in weights.items()}
    return {**published, **averages, "model_ema.decay": torch.tensor(0.999)}


def test_more_bits_of_geometry_lose_less():
    model = trained(geometry_bits=1)
    with torch.no_grad():
        whole = model(images()).images.clamp(-1, 1)
    losses = []
    for bits in (2, 4, 6, 8, 10):
        finer = tokenizer(geometry_bits=bits).eval()
        finer.load_state_dict(model.state_dict())
        losses.append((finer.decode(finer.encode(images())) - whole).square().mean().item())
    assert all(more > 2 * less for more, less in pairwise(losses)), losses


def test_tokens_are_codes_and_cells_of_ranges():
    model = trained(embed={**EMBED, "opacity": True})
    tokens = model.encode(images())
    assert model.layout() == TokenLayout.sequence(16, (32, *[256] * 6))
    with torch.no_grad():
        embedded = model.embedded(images())
    given, gaussians = embedded.gaussians, model.gaussians(tokens)
    largest = model.embed.limit.bound
    assert 3.9 < largest < 4.0
    for name, width in (("means", 2.0), ("scales", largest - 0.1), ("rotations", torch.pi), ("opacities", 1.0)):
        off = (getattr(gaussians, name) - getattr(given, name)).abs().max()
        assert 0 < off <= width / 512 + 1e-6, name
    assert torch.equal(gaussians.features, model.quantizer.codebook[tokens[..., 0]])
    assert torch.equal(model.drawn(gaussians).permute(0, 3, 1, 2), gaussians.rasterize(8, 8))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"decoder": {**OPTIONS["decoder"], "latent_width": 5}},
            "the decoder takes a map of width 5, but the quantizer's",
        ),
        (
            {"quantizer": {"name": "multi-scale", "quantizer": {**CODEBOOK}, "scales": [1, 4], "phi": 0}},
            "the latent space must be that of the last scale, (4, 4), got (16,)",
        ),
        (
            {
                "encoder": {
                    "name": "titok",
                    "width": 32,
                    "layers": 1,
                    "heads": 2,
                    "tokens": 4,
                    "grid": [2, 2],
                    "patch": 8,
                }
            },
            "Gaussians are made of a feature map, but the encoder's latent has the space (4,)",
        ),
    ],
)
def test_parts_that_do_not_go_together(changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        tokenizer(**changes)


def test_other_sizes_and_tokens_are_refused():
    model = tokenizer().eval()
    with pytest.raises(UserError, match=r"^these Gaussians are those of images of 16x16, not of 32x16$"):
        model.encode(torch.zeros(1, 3, 32, 16))
    with pytest.raises(UserError, match=r"^there are 16 Gaussians in an image, got 3 tokens$"):
        model.decode(torch.zeros(1, 3, 6, dtype=torch.int64))
    with pytest.raises(UserError, match=r"^token 256 of stream 1 is out of range"):
        model.decode(torch.full((1, 16, 6), 256) * torch.tensor([0, 1, 0, 0, 0, 0]))
    with pytest.raises(UserError, match=r"^the tokens of this tokenizer are sequence 16"):
        model.decode(torch.zeros(1, 16, 6, dtype=torch.int64), TokenLayout.sequence(16, (32,)))


@pytest.mark.parametrize("changes", [{}, {"share": True}, {"opacity": True, "positions": "learned"}])
def test_published_names_there_and_back(tmp_path, changes):
    original = trained(embed={**EMBED, **changes})
    file = tmp_path / "last.ckpt"
    export_file(original, "gaussiantoken", file)
    content = torch.load(file, weights_only=True)
    content |= {"epoch": 3, "callbacks": {}, "optimizer_states": [{}, {}]}
    content["state_dict"] |= {
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "gs_embed.op_module_map.spconv.grid_size": torch.zeros(2),
        "gs_embed.layers.2.to_features.0.weight": torch.zeros(1),
    }
    torch.save(content, file)
    overrides = [f"embed.{name}={str(value).lower()}" for name, value in changes.items()]
    again = import_checkpoint(file, overrides=[*overrides, "preprocessing.image_size=16"])
    assert again.options == original.options
    wanted = original.state_dict()
    fresh = {"embed.limit.mean", "quantizer.learning.revival.step", "quantizer.learning.revival.unused"}
    different = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, wanted[name])}
    assert different <= fresh
    assert torch.equal(again.encode(images()), original.encode(images()))


def test_averaged_weights_go_before_raw_ones():
    original = trained()
    published = averaged(export_checkpoint(original, "gaussiantoken"))
    raw, smooth = (import_checkpoint(published, ema=ema).state_dict() for ema in (False, True))
    wanted = original.state_dict()
    assert torch.equal(raw["embed.anchors"], wanted["embed.anchors"])
    torch.testing.assert_close(smooth["embed.anchors"], 1.1 * wanted["embed.anchors"])
    assert torch.equal(smooth["quantizer.codebook"], wanted["quantizer.codebook"])
    assert torch.equal(smooth["embed.limit.bound"], wanted["embed.limit.bound"])


def test_a_shared_weight_is_averaged_under_its_first_name():
    published = averaged(export_checkpoint(trained(), "gaussiantoken"))
    own = [name for name in published if name.startswith("model_ema.gs_embedlayers0")]
    for name in own:
        published[name.replace("layers0", "op_module_mapcross_attn", 1)] = published.pop(name)
    smooth = import_checkpoint(published).state_dict()
    name = "layers.0.self_attn.in_proj_weight"
    torch.testing.assert_close(
        smooth["embed.operations.0.layers.0.self_attention.in_proj_weight"],
        1.1 * published[f"gs_embed.layers.0.{name}"],
    )


def test_an_average_that_is_missing_is_told():
    published = averaged(export_checkpoint(trained(), "gaussiantoken"))
    del published["model_ema.gs_embedanchor_encoderoutput_fc0bias"]
    with pytest.raises(UserError, match=r"missing embed\.anchor_encoder\.out\.0\.bias"):
        import_checkpoint(published)


def test_an_option_that_no_file_tells_is_not_lost():
    model = tokenizer(embed={**EMBED, "moved": 5})
    with pytest.raises(UserError, match=r"no file of it tells embed\.moved, and an import would take another value$"):
        export_checkpoint(model, "gaussiantoken")
