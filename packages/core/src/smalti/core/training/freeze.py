"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Sequence

from smalti.core.autoencoder import Autoencoder
from smalti.core.backbones.tuning import keep_frozen
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.training.start import no_such_part


def freeze(model: Tokenizer | Autoencoder, names: Sequence[str]) -> None:
    """Take modules and weights of `model` out of training, in place, before optimizer and averaged weights are made.

    Frozen modules stay in evaluation mode: without dropout, without losses, without updates of codes and statistics.

    Raises:
        UserError: a name that the model does not have, or nothing is left to train.
    """
    option = f"train.{model.kind}.freeze"
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    for name in names:
        if name in weights:
            weights[name].requires_grad_(False)
        elif name in modules and name:
            keep_frozen(modules[name])
        else:
            raise no_such_part([*modules, *weights], name, f"{option}: the recipe's {model.kind}")
    if not any(weight.requires_grad for weight in weights.values()):
        raise UserError(f"{option}: {', '.join(names)} leave nothing to train")
