"""Run by `torchrun`: train the tokenizer of a recipe and write down what this process holds at the end.

torchrun --nproc-per-node 2 replica.py RUN RECIPE [PATH=VALUE]...
"""

import sys
from pathlib import Path

from smalti.core import distributed
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.stages.train_tokenizer import TrainTokenizer
from smalti.core.training import loop
from smalti.core.weights import save_tensors


def main(run: str, recipe: str, *overrides: str) -> None:
    """Train, then save every model of this process as `rank-<rank>-<model>.safetensors` beside the run."""
    finish = loop._Loop.run

    def and_save(self):
        averaged = finish(self)
        for name, model in self.task.models.items():
            save_tensors(Path(f"rank-{distributed.rank()}-{name}.safetensors"), model.state_dict())
        return averaged

    loop._Loop.run = and_save
    with distributed.joined("cpu"):
        folder = RunFolder(run)
        resolved = load_recipe(recipe, overrides)
        if distributed.rank() == 0:
            folder.prepare(resolved)
        distributed.barrier()
        TrainTokenizer(Context(folder, resolved, "cpu", Reporter(quiet=True))).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
