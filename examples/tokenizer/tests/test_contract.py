from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti_example_tokenizer.patches import PatchOptions


class TestPatches(TokenizerContract):
    options = PatchOptions(preprocessing=Preprocessing(image_size=16, channels=3))


class TestGreyPatches(TokenizerContract):
    options = PatchOptions(preprocessing=Preprocessing(image_size=32, channels=1, fit="pad"), digits=3, levels=7)
