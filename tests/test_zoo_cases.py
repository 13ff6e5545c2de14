"""The zoo says of published models what their own names and shapes say: layout, tokens, size."""

from pathlib import Path

import pytest
import torch

from smalti.core.checkpoints.importing import configured, module_class, recognised
from smalti.core.checkpoints.zoo import zoo
from smalti.core.contracts import Tokenizer
from smalti.core.testing import parity

FOLDER = Path(__file__).parent / "parity"
MODELS = {
    "fqgan-dual-ds16": "fqgan-dual-ds16",
    "fqgan-dual-ds8-layout": "fqgan-dual-ds8",
    "fqgan-triple-ds16": "fqgan-triple-ds16",
    "fqgan-triple-ds8-layout": "fqgan-triple-ds8",
    "gaussiantoken-cifar": "gaussiantoken-cifar-f4-gs64-cb1024",
    "gaussiantoken-imagenet-layout": "gaussiantoken-imagenet-f16-gs256-cb1024",
    "llamagen-vq-ds16": "llamagen-vq-ds16",
    "llamagen-vq-ds8": "llamagen-vq-ds8",
    "maskgitvq-full": "maskgit-vqgan",
    "quant-ibq-16384-layout": "ibq-16384",
    "quant-ibq-262144-layout": "ibq-262144",
    "quant-openmagvit2-128L-layout": "openmagvit2-128",
    "quant-openmagvit2-256L-layout": "openmagvit2-256",
    "sejal1d-mae64-layout": "sejal1d-mae64",
    "sejal1d-titok64-layout": "sejal1d-titok64",
    "titok-b64-layout": "titok-b64",
    "titok-bl128-vae-layout": "titok-bl128-vae",
    "titok-bl128-vq8k-layout": "titok-bl128-vq8k",
    "titok-bl64-vae-layout": "titok-bl64-vae",
    "titok-bl64-vq8k-layout": "titok-bl64-vq8k",
    "titok-l32-layout": "titok-l32",
    "titok-ll32-vae-layout": "titok-ll32-vae",
    "titok-s128": "titok-s128",
    "titok-sl256-vq8k-layout": "titok-sl256-vq8k",
    "titok-ta-bl128-vq-layout": "tatitok-bl128-vq",
    "titok-ta-bl32-vae-layout": "tatitok-bl32-vae",
    "titok-ta-sl128-vae-layout": "tatitok-sl128-vae",
    "var-vqvae-ch160": "var-vqvae",
    "vistok-fsqvae-celeba64-8555": "vistok-fsq-8555-celeba64",
    "vistok-fsqvae-celeba64-888": "vistok-fsq-888-celeba64",
    "vistok-ibqvae-imagenet64-512x64": "vistok-ibq512x64-imagenet64",
    "vistok-lfqvae-celeba64-9bit": "vistok-lfq9-celeba64",
    "vistok-simvqvae-celeba64-512x64": "vistok-simvq512x64-celeba64",
    "vistok-titok-base64-layout": "vistok-titok-b64-imagenet256",
    "vistok-vqgan-llamagen-16384x8": "vistok-vqgan-llamagen-imagenet256",
    "vistok-vqgan-taming-1024x256": "vistok-vqgan-taming-imagenet256",
    "vistok-vqvae-celeba64-ema512x64": "vistok-ema512x64-celeba64",
    "vistok-vqvae-celeba64-vq512x64": "vistok-vq512x64-celeba64",
    "xqgan-msvr10p2-4096": "xqgan-msvr10p2-4096",
    "xqgan-vp2-4096": "xqgan-vp2-4096",
}


@pytest.mark.parametrize("case", MODELS)
def test_the_table_agrees_with_the_layout(case):
    content, model = parity.read_case(FOLDER / f"{case}.json.gz"), zoo()[MODELS[case]]
    with torch.device("meta"):
        entries = {
            name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in content["state_dict"].items()
        }
        layout = recognised(_shapes(entries))
        config = configured(layout, _shapes(layout.select(entries, ema=True)), model.overrides)
        module = module_class(config["kind"]).from_config(config)
    assert (layout.name, config["kind"]) == (model.layout, model.kind)
    assert config["options"]["preprocessing"]["image_size"] == model.resolution
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert parameters == pytest.approx(model.parameters, rel=2e-3)
    if isinstance(module, Tokenizer):
        assert module.layout() == model.tokens
    else:
        positions, width = model.latents
        assert module.encoder.latent_space((model.resolution, model.resolution)) == (positions,)
        assert config["options"]["width"] == width


def _shapes(entries):
    return {name: tuple(tensor.shape) for name, tensor in entries.items()}
