"""Stage `tokenize`: from images to token shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from smalti.core import distributed
from smalti.core.contracts import Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.loader import read_images
from smalti.core.data.tar_shards import read_shard
from smalti.core.data.token_shards import ShardEntry, TokenManifest, shard_name, write_manifest, write_token_shard
from smalti.core.recipe import TokenizeSection
from smalti.core.stage import Stage
from smalti.core.weights import fingerprint


class Tokenize(Stage):
    """Writes the tokens of the training images to `tokens/`, shard by shard.

    Shard k holds records `[k * shard_size, (k + 1) * shard_size)` of the data set, whatever the number of
    processes; each process makes a run of neighbouring shards and skips those that are there.
    """

    name = "tokenize"
    sections = ("tokenize",)
    after = ("train-tokenizer",)
    outputs = ("tokens",)

    @property
    def options(self) -> TokenizeSection:
        """How the shards are made."""
        options = self.context.recipe.tokenize
        assert options is not None, "the pipeline leaves this stage out"
        return options

    def run(self) -> None:
        """Make the shards that are missing, then the layout file."""
        context, size = self.context, self.options.shard_size
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer").to(context.device)
        dataset = context.recipe.data.train.build()
        paths = [context.run / "tokens" / shard_name(shard) for shard in range(-(-len(dataset) // size))]
        rank, world = distributed.rank(), distributed.world_size()
        own = range(rank * len(paths) // world, (rank + 1) * len(paths) // world)
        records = {shard: min(len(dataset) - shard * size, size) for shard in own}
        done = sum(count for shard, count in records.items() if paths[shard].exists())
        with context.reporter.progress(self.name, sum(records.values()), done, "image") as advance:
            for shard in own:
                if not paths[shard].exists():
                    self._make(paths[shard], tokenizer, dataset, shard * size, advance)
        distributed.barrier()
        if rank == 0:
            self._finish(paths, tokenizer, dataset)

    @torch.inference_mode()
    def _make(
        self, path: Path, tokenizer: Tokenizer, dataset: ImageDataset, start: int, advance: Callable[[int], None]
    ) -> None:
        recipe, options = self.context.recipe, self.options
        keys: list[str] = []
        labels: list[int] = []
        tokens = []
        batches = read_images(
            dataset,
            tokenizer.preprocessing,
            options.batch_size,
            start,
            start + options.shard_size,
            max_undecodable=recipe.data.max_undecodable,
            warn=self.context.reporter.say,
            workers=recipe.data.workers,
        )
        for batch in batches:
            images = batch.images.to(self.context.device)
            views = [tokenizer.encode(images)]
            if options.flip:
                views.append(tokenizer.encode(images.flip(-1)))
            tokens.append(torch.stack(views, dim=1).cpu().numpy())
            keys += batch.keys
            labels += batch.labels.tolist()
            advance(len(images))
        layout = tokenizer.layout()
        views_made = 2 if options.flip else 1
        empty = np.empty((0, views_made, layout.positions, layout.streams), np.int64)
        write_token_shard(path, keys, np.concatenate([empty, *tokens]), labels, layout)

    def _finish(self, paths: list[Path], tokenizer: Tokenizer, dataset: ImageDataset) -> None:
        """Write the file that says the shards are complete; undecodable images are not in them."""
        entries = tuple(ShardEntry(name=path.name, samples=sum(1 for _ in read_shard(str(path)))) for path in paths)
        manifest = TokenManifest(
            layout=tokenizer.layout(),
            classes=dataset.classes,
            tokenizer=fingerprint(tokenizer, tokenizer.config()),
            dataset=dataset.name,
            samples=sum(entry.samples for entry in entries),
            views=("original", "flip") if self.options.flip else ("original",),
            shards=entries,
        )
        write_manifest(paths[0].parent, manifest)
