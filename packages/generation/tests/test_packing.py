"""Packed weights compute the same, notice changes, and leave nothing behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation import packing
from smalti.generation.ar import AROptions
from smalti.generation.packing import packed_weights


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48, bias=False))


@pytest.mark.parametrize("shape", [(64,), (2, 64), (3, 5, 64), (0, 64)])
@torch.no_grad()
def test_float32_differs_in_rounding_only(shape: tuple[int, ...]) -> None:
    module, x = layers(), torch.randn(shape)
    expected = module(x)
    with packed_weights(module):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.02), ("int8", 0.02)])
@torch.no_grad()
def test_fewer_bytes_change_the_result_a_little(precision: packing.Precision, error: float) -> None:
    module, x = layers(), torch.randn(3, 5, 64)
    expected = module(x)
    with packed_weights(module, precision):
        found = module(x)
    assert found.dtype == torch.float32
    distance = (found - expected).abs().max() / expected.std()
    assert 1e-5 < distance < 3 * error


@torch.no_grad()
def test_int8_is_the_plain_rounding() -> None:
    module = layers()[0]
    scale = module.weight.abs().amax(1, keepdim=True) / 127
    rounded = (module.weight / scale).round().clamp(-127, 127) * scale.bfloat16().float()
    x = torch.randn(4, 64).bfloat16().float()
    with packed_weights(module, "int8"):
        torch.testing.assert_close(module(x), x @ rounded.T + module.bias, rtol=0.01, atol=0.01)


@torch.no_grad()
def test_int8_leaves_layers_that_torch_cannot_take() -> None:
    module, x = nn.Linear(24, 7), torch.randn(3, 24)
    expected = module(x)
    with packed_weights(module, "int8"):
        torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@torch.no_grad()
def test_fewer_bytes_of_no_rows(precision: packing.Precision) -> None:
    module = layers()
    with packed_weights(module, precision):
        assert module(torch.zeros(0, 5, 64)).shape == (0, 5, 48)


@torch.no_grad()
def test_what_is_packed_is_kept_until_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    pack = packing._PACKERS["full"]
    monkeypatch.setitem(packing._PACKERS, "full", lambda weight, bias: packed.append(1) or pack(weight, bias))
    module, x = layers()[1], torch.randn(2, 96)
    for _ in range(3):
        with packed_weights(module):
            module(x)
    assert len(packed) == 1
    module.weight.mul_(2.0)
    with packed_weights(module):
        torch.testing.assert_close(module(x), x @ module.weight.T, rtol=1e-5, atol=1e-5)
    module.weight = nn.Parameter(torch.ones(48, 96))
    with packed_weights(module):
        torch.testing.assert_close(module(x), x @ module.weight.T, rtol=1e-5, atol=1e-5)
    assert len(packed) == 3


@torch.no_grad()
def test_another_bias_is_noticed() -> None:
    module, x = layers()[0], torch.randn(2, 64)
    for value in (0.0, 1.0):
        module.bias = nn.Parameter(torch.full((96,), value))
        with packed_weights(module):
            torch.testing.assert_close(module(x), x @ module.weight.T + value, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_weights_in_the_same_memory_are_noticed() -> None:
    """Memory that a layer lets go of may hold its next weights."""
    module, x = nn.Linear(64, 96, bias=False), torch.randn(2, 64)
    for _ in range(20):
        with packed_weights(module):
            module(x)
        module.weight.data = torch.empty(0)
        module.weight.data = torch.randn(96, 64)
        with packed_weights(module):
            torch.testing.assert_close(module(x), x @ module.weight.T, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nothing_is_left_behind() -> None:
    module = layers()

    def fail() -> None:
        with packed_weights(module), packed_weights(module, "bfloat16"):
            assert "forward" in vars(module[0])
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert all("forward" not in vars(layer) for layer in module)
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()


def test_layers_that_train_or_are_no_float32_stay_as_they_are() -> None:
    module = layers()
    with packed_weights(module):  # gradients are on
        assert "forward" not in vars(module[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_weights(module):
        assert "forward" not in vars(module[0])
    with torch.no_grad(), packed_weights(module.bfloat16()):
        assert "forward" not in vars(module[0])


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_the_setting_reaches_the_layers(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    pack = packing._PACKERS[weights]
    monkeypatch.setitem(packing._PACKERS, weights, lambda weight, bias: used.append(1) or pack(weight, bias))
    model = AROptions(layers=1, dim=32, heads=2, ffn_multiple=8).build(TokenLayout.grid(2, 2, (32,)), 3)
    assert model.sample(torch.arange(3), SamplingSettings(weights=weights)).shape == (3, 4, 1)
    assert len(used) == 5  # attention and feed-forward have two layers each
