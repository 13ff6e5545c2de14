"""VAR with the quantizers that it goes with: what it computes, draws, edits, and refuses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from smalti.core.checkpoints.importing import configured, recognised
from smalti.core.checkpoints.zoo import zoo
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.pipeline import Pipeline
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.stage import Context
from smalti.core.testing import GeneratorContract, parity
from smalti.generation.attention import attention_kernel
from smalti.generation.sampling import TokenSampler
from smalti.generation.var import VAR, VAROptions
from smalti.generation.var_editing import inside_box, kept_positions
from smalti.generation.var_training import drawn_mask
from smalti.quant.multi_scale import MultiScaleOptions
from smalti.quant.product import ProductOptions

SIDES = (1, 2, 3, 5)
VQ = {"name": "vq", "dim": 6, "codebook_size": 16}
SCALES = MultiScaleOptions(quantizer=VQ, scales=SIDES, phi=2)
BRANCHES = ProductOptions(quantizers=(SCALES,), branches=2)
BITS = MultiScaleOptions(quantizer={"name": "bsq", "bits": [3, 2]}, scales=(1, 1, 2, 3), phi=4, normalise=True)
SMALL = {"layers": 2, "dim": 32, "heads": 4, "gate_start": 1.0}
GUIDED = SamplingSettings(guidance_scale=3.0, guidance="linear", top_k=8, top_p=0.9, seed=4)


def layout_of(quantizer, streams=None):
    built = quantizer.build()
    scales = BITS.scales if quantizer is BITS else SCALES.scales
    return TokenLayout.scales(scales, built.vocab)


class TestVAR(GeneratorContract):
    options = VAROptions(**SMALL, quantizer=SCALES)
    layout = layout_of(SCALES)
    unsupported = TokenLayout.grid(3, 3, (16,))


class TestVARShared(GeneratorContract):
    options = VAROptions(**SMALL, quantizer=BITS, shared_modulation=True, masking={"share": 0.3, "steps": 100})
    layout = layout_of(BITS)
    unsupported = TokenLayout.sequence(9, (16,))


class TestImageFolder(GeneratorContract):
    options = VAROptions(**SMALL, quantizer=BRANCHES, cosine_attention=False, drop_path=0.1)
    layout = layout_of(BRANCHES)


def build(quantizer=SCALES, classes=5, **options) -> VAR:
    torch.manual_seed(0)
    model = VAROptions(**SMALL, quantizer=quantizer, **options).build(layout_of(quantizer), classes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape), alpha=0.2)
    return model.eval()


def tokenizer(quantizer, **options) -> Tokenizer:
    torch.manual_seed(3)
    cnn = {"name": "vqgan", "width": 8, "multipliers": [1, 1], "groups": 4, "blocks": 1, "latent_width": 8}
    config = {
        "name": "composed",
        "preprocessing": {"image_size": 10},
        "encoder": cnn,
        "quantizer": quantizer.model_dump(),
        "decoder": cnn,
        **options,
    }
    return registry().options("tokenizer", "composed").model_validate(config).build().eval()


def tokens_of(model: VAR, batch=3):
    generator = torch.Generator().manual_seed(1)
    layout = model.token_layout
    streams = [torch.randint(size, (batch, layout.positions), generator=generator) for size in layout.vocab]
    return torch.stack(streams, dim=-1)


def uncached(model: VAR, labels, settings):
    """The plain twin of `sample`: every scale computes the whole sequence again, guidance in two passes."""
    layout, areas = model.token_layout, model.areas
    tokens = torch.zeros(len(labels), layout.positions, layout.streams, dtype=torch.int64)
    null = torch.full_like(labels, model.classes)
    sampler = TokenSampler(settings, torch.arange(len(labels)), len(areas), layout.streams)
    for scale, area in enumerate(areas):
        end = sum(areas[: scale + 1])
        both = [model.logits(tokens[:, :end], some) for some in (labels, null)]
        for stream in range(layout.streams):
            rows = torch.cat([logits[stream][:, end - area :] for logits in both])
            tokens[:, end - area : end, stream] = sampler.draw(rows, scale, stream, scale / (len(areas) - 1))
    return tokens


@pytest.mark.parametrize("quantizer", [SCALES, BRANCHES, BITS], ids=["scales", "branches", "bits"])
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_samples_are_those_of_the_plain_twin(quantizer, shared):
    model = build(quantizer, shared_modulation=shared, cosine_attention=not shared)
    labels = torch.arange(3)
    drawn = model.draw(labels, GUIDED)
    assert torch.equal(drawn.tokens, uncached(model, labels, GUIDED))
    torch.testing.assert_close(drawn.latent, model.quantizer.decode(drawn.tokens, model.token_layout.shape[-1]))


def test_no_samples():
    assert build(BRANCHES).sample(torch.zeros(0, dtype=torch.int64), GUIDED).shape == (0, 39, 2)


def test_every_stream_has_settings_of_its_own():
    model, labels = build(BRANCHES), torch.arange(4)
    settings = GUIDED.model_copy(update={"temperature": (0.0, 1.0), "top_k": (0, 4), "guidance_scale": (3.0, 1.0)})
    with torch.no_grad():
        assert torch.equal(model.sample(labels, settings), uncached(model, labels, settings))


def test_kernels_of_training_agree():
    model, labels = build().train(), torch.arange(3)
    gradients = []
    for kernel in ("sdpa", "flex", "plain"):
        model.zero_grad()
        torch.manual_seed(1)
        with attention_kernel(kernel):
            (loss,) = model(tokens_of(model), labels).values()
        loss.backward()
        gradients.append((loss.detach(), model.transformer.blocks[0].attention.qkv.weight.grad.clone()))
    for loss, gradient in gradients[1:]:
        torch.testing.assert_close(loss, gradients[0][0])
        torch.testing.assert_close(gradient, gradients[0][1], atol=1e-6, rtol=1e-4)


def test_the_finest_scale_is_not_read_and_coarser_ones_are():
    model, tokens, labels = build(), tokens_of(build()), torch.arange(3)
    (before,) = model.logits(tokens, labels)
    changed = tokens.clone()
    changed[:, -25:] = (changed[:, -25:] + 1) % 16
    assert torch.equal(model.logits(changed, labels)[0], before)
    changed[:, 5] = (changed[:, 5] + 1) % 16
    (after,) = model.logits(changed, labels)
    assert torch.equal(after[:, :14], before[:, :14])
    assert bool((after[:, 14:] != before[:, 14:]).any(-1).all())
    torch.testing.assert_close(model.logits(tokens[:, :14], labels)[0], before[:, :14])


def test_growth_learns_the_first_scales_and_lets_the_newest_in_slowly():
    growth = {"first": 2, "start": 10, "end": 30, "ramp": 8}
    model = build(growth=growth, label_dropout=0.0, drop_path=0.0).train()
    tokens, labels = tokens_of(model), torch.arange(3)
    (logits,) = model.logits(tokens, labels)
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[..., 0], reduction="none").mean(0).detach()
    for step, ends in ((0, {5: 1.0}), (14, {5: 1.0}), (17, {5: 1.0, 14: 0.25}), (100, {14: 1.0, 39: 1.0})):
        model.begin_step(step)
        expected, start = 0.0, 0
        for end, weight in ends.items():
            expected, start = expected + weight * losses[start:end].sum() / 39, end
        torch.testing.assert_close(model(tokens, labels)["cross_entropy"].detach(), torch.as_tensor(expected))
    options = model.options.growth
    counts = [options.scales(step, 4) for step in range(40)]
    assert counts == [2] * 15 + [3] * 10 + [4] * 15
    assert options.weight(15, 4) == 0.01
    assert options.weight(33, 4) == 1.0
    model.eval()
    torch.testing.assert_close(model.loss(tokens, labels)["cross_entropy"], losses.mean())


def test_masking_falls_to_nothing():
    model = build(masking={"share": 1.0, "steps": 50})
    words, shares = torch.zeros(400, 50, 1), []
    torch.manual_seed(0)
    for step in (0, 25, 50):
        model.begin_step(step)
        shares.append(drawn_mask(words, model.inputs.masked_share).float().mean().item())
    assert shares == pytest.approx([0.5, 0.25, 0.0], abs=0.03)
    model.train().begin_step(50)
    tokens, labels = tokens_of(model), torch.arange(3)
    assert not model.inputs.masked_word.grad
    torch.manual_seed(0)
    at_the_end = model(tokens, labels)["cross_entropy"]
    model.begin_step(0)
    torch.manual_seed(0)
    assert model(tokens, labels)["cross_entropy"] != at_the_end


def test_it_starts_near_the_identity():
    torch.manual_seed(0)
    model = VAROptions(**{**SMALL, "gate_start": 1e-5}, quantizer=SCALES).build(layout_of(SCALES), 5).eval()
    tokens, labels = tokens_of(model), torch.arange(3)
    assert model.loss(tokens, labels)["cross_entropy"].item() == pytest.approx(math.log(16), abs=0.01)
    assert model.output.weight.std().item() == pytest.approx(0.02 / math.sqrt(96), rel=0.1)
    gates, others = model.transformer.blocks[0].modulation.linear.weight.split([64, 128])
    assert gates.std().item() == pytest.approx(1e-5 / math.sqrt(96), rel=0.1)
    assert others.std().item() == pytest.approx(0.5 / math.sqrt(96), rel=0.1)


def test_smooth_sampling_mixes_codes():
    model, labels = build(), torch.arange(3)
    drawn = model.draw(labels, GUIDED, smooth=True)
    space = model.token_layout.shape[-1]
    assert torch.equal(drawn.tokens[:, :1], model.sample(labels, GUIDED)[:, :1])
    assert (drawn.latent - model.quantizer.decode(drawn.tokens, space)).abs().max() > 0.01
    again = model.draw(labels[1:], GUIDED, torch.tensor([1, 2]), smooth=True)
    torch.testing.assert_close(again.latent, drawn.latent[1:])
    # What a single code is left of is that code.
    single = model.draw(labels, GUIDED.model_copy(update={"temperature": 0.0}), smooth=True)
    torch.testing.assert_close(single.latent, model.quantizer.decode(single.tokens, space))
    with pytest.raises(UserError, match=r"^smooth sampling mixes the codes of one stream, not of 2$"):
        build(BRANCHES).draw(labels, GUIDED, smooth=True)


def test_editing_keeps_what_the_mask_keeps():
    model, labels = build(BRANCHES), torch.tensor([1, 0, 4])
    tokens, layout = tokens_of(model), model.token_layout
    inside = inside_box(layout, 0.2, 0.0, 0.8, 0.6)
    assert inside.sum() == 9
    for mask in (inside, ~inside):
        kept = kept_positions(mask, layout)
        edited = model.edit(tokens, mask, labels, GUIDED)
        assert kept[0]
        assert torch.equal(edited.tokens[:, kept], tokens[:, kept])
        assert not torch.equal(edited.tokens, tokens)
        torch.testing.assert_close(edited.latent, model.quantizer.decode(edited.tokens, (5, 5)))
    everything = model.edit(tokens, torch.ones(5, 5, dtype=torch.bool), labels, GUIDED)
    assert torch.equal(everything.tokens, tokens)
    of_null = model.edit(tokens, inside, None, GUIDED)
    plain = GUIDED.model_copy(update={"guidance_scale": 1.0})
    assert torch.equal(of_null.tokens, model.edit(tokens, inside, None, plain).tokens)
    smooth = build().edit(tokens_of(build()), inside, labels, GUIDED, smooth=True)
    assert torch.equal(smooth.tokens[:, kept_positions(inside, layout)], tokens[:, kept_positions(inside, layout), :1])


def test_a_tokenizer_is_attached_and_saved_with_it(tmp_path):
    torch.manual_seed(0)
    model = VAROptions(**SMALL).build(layout_of(BRANCHES), 5).eval()
    labels = torch.arange(3)
    sentence = r"^this var has no tokenizer yet: call attach\(tokenizer\) with the one whose tokens it models$"
    with pytest.raises(UserError, match=sentence):
        model.sample(labels, GUIDED)
    with pytest.raises(UserError, match=sentence):
        model.loss(tokens_of(model), labels)
    paired = tokenizer(BRANCHES)
    model.attach(paired)
    drawn = model.draw(labels, GUIDED)
    assert torch.equal(paired.decode_latent(drawn.latent), paired.decode(drawn.tokens))
    assert not any(weight.requires_grad for weight in model.quantizer.parameters())
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert loaded.options.quantizer == BRANCHES
    assert torch.equal(loaded.sample(labels, GUIDED), drawn.tokens)
    with torch.no_grad():
        next(paired.quantizer.parameters()).zero_()
    assert torch.equal(model.sample(labels, GUIDED), drawn.tokens)


def test_tokenizers_that_do_not_fit_are_told():
    model = VAROptions(**SMALL, code_width=8).build(layout_of(SCALES), 5)
    with pytest.raises(UserError, match=r"^this generator takes a latent 8 wide, the tokenizer's is 6 wide$"):
        model.attach(tokenizer(SCALES))
    with pytest.raises(UserError, match=r"^this generator is for scales 1x1, 2x2, .*, the tokenizer makes scales 5x5"):
        model.attach(tokenizer(MultiScaleOptions(quantizer=VQ, scales=(5,), phi=0)))
    turned = registry().options("quantizer", "rotated").model_validate(
        {"name": "rotated", "quantizer": SCALES.model_dump()}
    )  # fmt: skip
    with pytest.raises(UserError, match=r"^the quantizer 'rotated' does not go from scale to scale$"):
        VAROptions(**SMALL).build(layout_of(SCALES), 5).attach(tokenizer(turned))


def test_a_further_step_is_no_further_graph():
    """Masking and the weight of the newest scale change with every step."""
    model = build(growth={"first": 2, "end": 30, "ramp": 8}, masking={"share": 0.5, "steps": 50}).train()
    tokens, labels, graphs = tokens_of(model), torch.arange(3), []
    torch._dynamo.reset()
    step = torch.compile(model, backend=lambda graph, _: (graphs.append(1), graph.forward)[1], fullgraph=True)
    for number in range(8, 12):
        model.begin_step(number)
        step(tokens, labels)
    assert len(graphs) == 1


@pytest.mark.parametrize("quantizer", [SCALES, BRANCHES])
def test_the_training_step_is_one_graph(quantizer):
    torch.manual_seed(0)
    layout = layout_of(quantizer)
    model = VAROptions(**SMALL, quantizer=quantizer).build(layout, 3).train()
    tokens = torch.stack([torch.randint(size, (3, layout.positions)) for size in layout.vocab], dim=-1)
    torch._dynamo.reset()
    found = []
    for step in (torch.compile(model, backend="eager", fullgraph=True), model):
        torch.manual_seed(1)
        losses = step(tokens, torch.arange(3))
        torch.stack([*losses.values()]).sum().backward()
        found.append({name: loss.detach() for name, loss in losses.items()})
    torch.testing.assert_close(found[0], found[1])


def test_the_zoo_knows_imagefolder():
    case = parity.read_case(Path(__file__).parent / "parity" / "xqgan-var-d17-layout.json.gz")
    shapes = {name: tuple(entry["shape"]) for name, entry in case["state_dict"].items()}
    model, layout = zoo()["imagefolder-var-d17"], recognised(shapes)
    config = configured(layout, shapes, model.overrides)
    assert layout.name == model.layout
    assert TokenLayout.model_validate(config["layout"]) == model.tokens


@pytest.mark.slow
def test_a_run_from_images_to_samples(tmp_path):
    """Every stage: the quantizer comes along, and training tells the step to growth."""
    random = np.random.default_rng(0)
    for index in range(8):
        path = tmp_path / "images" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)
    dataset = {"name": "folder", "path": str(tmp_path / "images")}
    training = {"steps": 4, "batch_size": 4, "learning_rate": 0.001, "log_every": 1, "checkpoint_every": 2}
    recipe = {
        "name": "scales",
        "summary": "for tests",
        "data": {"train": dataset, "validation": dataset},
        "tokenizer": tokenizer(SCALES).options.model_dump(mode="json"),
        "generator": {"name": "var", **SMALL, "growth": {"first": 2, "end": 3}},
        "train": {"tokenizer": {**training, "losses": [{"name": "l2"}]}, "generator": training},
        "tokenize": {"batch_size": 4, "shard_size": 8},
        "sample": {"count": 4, "batch_size": 2, "grid_columns": 2, "guidance_scale": 2.0, "guidance": "linear"},
    }
    path = tmp_path / "scales.yaml"
    path.write_text(yaml.safe_dump(recipe))
    run, loaded = RunFolder(tmp_path / "run"), load_recipe(path)
    with run.locked():
        run.prepare(loaded)
        Pipeline(Context(run, loaded, "cpu", Reporter(quiet=True))).run()
    generator = Generator.from_pretrained(run / "generator")
    paired = Tokenizer.from_pretrained(run / "tokenizer")
    assert isinstance(generator, VAR)
    for name, tensor in paired.quantizer.state_dict().items():
        assert torch.equal(generator.quantizer.state_dict()[name], tensor), name
    losses = [line["cross_entropy"] for line in run.metrics("train-generator")]
    assert losses[0] < 0.5 * losses[-1]  # of 5 positions at first, of 39 in the end
    assert np.load(run / "samples" / "samples.npz")["arr_0"].shape == (4, 10, 10, 3)
