"""The predicted peak of sampling against what the process took, with a real generator and decoder."""

import json
import os
import subprocess
import sys

import pytest

SAMPLING = r"""
import json
import re
from pathlib import Path

import torch

from smalti.core.data.images import to_uint8
from smalti.core.recipe import load_recipe
from smalti.core.sampling.memory import sampling_memory
from smalti.core.sampling_settings import SamplingSettings


def most():
    # Not ru_maxrss, which a process takes over from the one that starts it.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


torch.set_num_threads(1)
options = load_recipe("quickstart", ["tokenizer.preprocessing.image_size=SIZE", "generator.dim=WIDTH"])
tokenizer = options.tokenizer.build().eval()
generator = options.generator.build(tokenizer.layout(), 10)
settings = SamplingSettings(guidance_scale=2.0)
predicted = sampling_memory(generator, tokenizer, settings).peak(64)
before = most()
with torch.inference_mode():
    tokens = generator.sample(torch.arange(64) % 10, settings)
    images = to_uint8(tokenizer.decode(tokens))
print(json.dumps([predicted, most() - before]))
"""


@pytest.mark.parametrize(
    ("size", "width"),
    [(32, 160), (64, 20)],
    ids=["caches are the most", "the decoder is"],
)
def test_the_peak_is_predicted_within_a_tenth(size, width):
    program = SAMPLING.replace("SIZE", str(size)).replace("WIDTH", str(width))
    # Blocks of a few MiB, as these small models have, glibc keeps for later; this lets it give them back, as it does
    # with larger ones.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    predicted, measured = json.loads(done.stdout)
    assert measured == pytest.approx(predicted, rel=0.1)
