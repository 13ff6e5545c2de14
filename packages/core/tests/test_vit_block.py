import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.backbones.vit_block import DropPath, SelfAttention, ViTBlock, activation_layer

DOUBLE = {"dtype": torch.float64}


def attention_by_formula(layer, x):
    query, key, value = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return layer.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


def block_by_formula(block, x, eps, activation):
    scale1, scale2 = (1.0 if scale is None else scale for scale in (block.scale1, block.scale2))
    width = x.shape[-1:]
    x = x + scale1 * attention_by_formula(
        block.attention, F.layer_norm(x, width, block.norm1.weight, block.norm1.bias, eps)
    )
    hidden = activation(block.mlp[0](F.layer_norm(x, width, block.norm2.weight, block.norm2.bias, eps)))
    return x + scale2 * block.mlp[2](hidden)


@settings(deadline=None, max_examples=10)
@given(
    heads=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 9),
    bias=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    mlp_width=st.sampled_from([None, 10]),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_block_equals_its_formula(heads, length, bias, scale, mlp_width, eps):
    torch.manual_seed(length)
    block = ViTBlock(8, heads, qkv_bias=bias, layer_scale=scale, mlp_width=mlp_width, eps=eps).double().train()
    x = torch.randn(2, length, 8, requires_grad=True, **DOUBLE)
    found, expected = block(x), block_by_formula(block, x, eps, F.gelu)
    torch.testing.assert_close(found, expected)
    weights = [x, *block.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_parts_are_there_as_asked():
    names = {name for name, _ in ViTBlock(8, 2, qkv_bias=False).named_parameters()}
    assert "attention.qkv.bias" not in names
    assert "scale1" not in names
    assert {"attention.qkv.bias", "scale1", "scale2", "mlp.0.weight", "mlp.2.bias", "attention.out.weight"} <= {
        name for name, _ in ViTBlock(8, 2, layer_scale=1.0).named_parameters()
    }


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
        ("gelu-tanh", lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2),
        ("quick-gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        ("tanh", lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)),
    ],
)
def test_activations(name, function):
    x = torch.linspace(-4, 4, 41, **DOUBLE)
    torch.testing.assert_close(activation_layer(name)(x), function(x))


def test_a_sample_does_not_see_its_batch():
    torch.manual_seed(0)
    block, x = ViTBlock(8, 2), torch.randn(3, 5, 8)
    torch.testing.assert_close(block(x), torch.cat([block(one[None]) for one in x]))


def test_drop_path_keeps_the_mean_and_rests_in_evaluation():
    torch.manual_seed(0)
    layer, ones = DropPath(0.25), torch.ones(4000, 2, 3)
    dropped = layer.train()(ones)
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 4 / 3]))
    assert (dropped == dropped[:, :1, :1]).all()  # whole samples
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    assert layer.eval()(ones) is ones
    block = ViTBlock(8, 2, drop_path=0.999999).train()
    x = torch.randn(2, 5, 8)
    assert torch.equal(block(x), x)


def test_compiles_and_takes_bfloat16():
    torch.manual_seed(0)
    block, x = ViTBlock(8, 2, layer_scale=0.5), torch.randn(2, 5, 8)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
    torch.testing.assert_close(low.float(), block(x), atol=0.1, rtol=0.05)


def test_attention_mixes_positions_and_only_by_content():
    torch.manual_seed(0)
    layer, x = SelfAttention(8, 2), torch.randn(1, 6, 8)
    order = torch.randperm(6)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])
