"""Stage `train-autoencoder`: from images to a trained autoencoder."""

from __future__ import annotations

import torch

from smalti.core.noise import mixed_seed
from smalti.core.stage import Stage
from smalti.core.stages.train_tokenizer import fit
from smalti.core.training.validator import PICTURES


class TrainAutoencoder(Stage):
    """Trains the recipe's autoencoder as a tokenizer is; writes `autoencoder/`, and perhaps what goes with it."""

    name = "train-autoencoder"
    sections = ("seed", "data", "autoencoder", "train.autoencoder")
    after = ()
    outputs = ("autoencoder", "autoencoder-best", PICTURES)

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        recipe = self.context.recipe
        options, training = recipe.autoencoder, recipe.train.autoencoder
        assert options is not None, "the pipeline leaves this stage out"
        assert training is not None, "a recipe with an autoencoder trains it"
        torch.manual_seed(mixed_seed(recipe.seed, self.name, "weights"))
        fit(self, options.build(), training)
