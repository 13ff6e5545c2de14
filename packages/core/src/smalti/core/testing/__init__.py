"""Contract tests: subclass one, name your options, and pytest runs the contract over your component.

    from smalti.core.testing import QuantizerContract

    class TestMine(QuantizerContract):
        options = MyQuantizerOptions(dim=8, codebook_size=64)

Needs pytest. The built-in components run exactly these.
"""

from smalti.core.testing.generator import GeneratorContract
from smalti.core.testing.quantizer import QuantizerContract
from smalti.core.testing.tokenizer import TokenizerContract

__all__ = ["GeneratorContract", "QuantizerContract", "TokenizerContract"]
