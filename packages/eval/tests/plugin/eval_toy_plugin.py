"""A plugin with a tokenizer and a generator that need no training, so that evaluation can be tested alone."""

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register():
    yield Component("tokenizer", "tiles", "eval_toy_components:TilesOptions", "mean grey level of each tile")
    yield Component("generator", "uniform", "eval_toy_components:UniformOptions", "every token as likely as any")
    yield Component("features", "pixels", "eval_toy_components:PixelsOptions", "a random projection of pixels")
    yield Component("features", "small-network", "eval_toy_components:SmallNetworkOptions", "seeded convolutions")
