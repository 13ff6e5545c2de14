"""A plugin with the smallest quantizer and generator there are, so that core's pipeline can be tested alone."""

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register():
    yield Component("quantizer", "signs", "toy_components:SignsOptions", "one bit per latent channel")
    yield Component("generator", "table", "toy_components:TableOptions", "independent tokens of a class")
    yield Component("stage", "evaluate", "toy_components:CountOptions", "counts the samples")
    yield Component("checkpoint", "toy", "toy_published:ToyLayout", "the tests' tokenizer under other names")
    yield Component("metric", "difference", "toy_published:DifferenceOptions", "mean absolute difference")
    yield Component("zoo", "toy", "toy_zoo", "what the tests publish")
