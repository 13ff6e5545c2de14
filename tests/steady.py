"""A tiny run through the real stages that watches its own memory: python steady.py STEPS SAMPLES.

Prints a line of JSON for each stage: what it took on its way: MiB resident, and objects that Python's collector knows.
"""

import gc
import io
import json
import re
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context

LOOKS = 12


def resident() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


class Watching(Reporter):
    """Looks at the process's memory at equal distances of each stage."""

    @contextmanager
    def progress(self, title, total, done=0, unit="it"):
        looks = []
        finished = done

        def advance(amount=1, note=None):
            nonlocal finished
            before, finished = finished, finished + amount
            if finished * LOOKS // total > before * LOOKS // total:
                gc.collect()
                looks.append((round(resident(), 1), len(gc.get_objects())))

        yield advance
        print(json.dumps({title: looks}), flush=True)


def images(path: Path) -> None:
    """48 grey images of 3 classes."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for index in range(48):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (8, 8), np.uint8)).save(buffer, "PNG")
            for name, content in ((f"{index:03d}.png", buffer.getvalue()), (f"{index:03d}.cls", b"%d" % (index % 3))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def recipe(steps: int, samples: int) -> Recipe:
    dataset = {"name": "webdataset", "shards": "images.tar", "classes": 3, "shuffle_buffer": 16}
    every = max(steps // 50, 10)
    training = {"steps": steps, "batch_size": 4, "learning_rate": 1e-3, "ema_decay": 0.9,
                "log_every": every // 5, "checkpoint_every": every}  # fmt: skip
    validation = {"every": every, "images": 8, "pictures": 2}
    layers = {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2}
    classifier = {"steps": 40, "width": 8, "batch_size": 4, "checkpoint_every": 20, "log_every": 20}
    return Recipe.model_validate({
        "name": "steady",
        "summary": "memory",
        "data": {"train": dataset, "validation": dataset},
        "tokenizer": {
            "name": "composed",
            "preprocessing": {"image_size": 16, "channels": 1, "fit": "pad"},
            "encoder": layers,
            "quantizer": {"name": "vq", "dim": 4, "codebook_size": 16},
            "decoder": layers,
        },
        "generator": {"name": "ar", "layers": 1, "dim": 8, "heads": 2, "ffn_multiple": 4},
        "train": {
            "tokenizer": {**training, "losses": [{"name": "l2"}], "validation": validation},
            "generator": {**training, "validation": validation},
        },
        "tokenize": {"batch_size": 4, "shard_size": 10, "flip": True},
        "sample": {"count": samples, "batch_size": 20},
        "evaluate": {"classifier": classifier, "batch_size": 20},
    })  # fmt: skip


def main() -> None:
    steps, samples = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    images(Path("images.tar"))
    reporter = Watching(quiet=True)
    context = Context(RunFolder("run"), recipe(steps, samples), "cpu", reporter)
    context.run.prepare(context.recipe)
    Pipeline(context).run()


if __name__ == "__main__":
    main()
