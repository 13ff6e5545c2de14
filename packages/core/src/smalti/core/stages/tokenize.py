"""Stage `tokenize`: from images to token shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from smalti.core import distributed
from smalti.core.contracts import Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.loader import read_images
from smalti.core.data.stored_tokens import TokenSamples, TokenSource
from smalti.core.data.tar_shards import index_shard
from smalti.core.data.token_shards import ShardEntry, TokenManifest, shard_name, write_manifest, write_token_shard
from smalti.core.data.views import Views
from smalti.core.recipe import TokenizeSection
from smalti.core.stage import Stage
from smalti.core.weights import fingerprint

Read = Callable[[int, int, Callable[[int], None]], TokenSamples]


class Tokenize(Stage):
    """Writes the tokens of the training images, or stored ones, to `tokens/`, shard by shard.

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
        source, read = self._source(tokenizer)
        paths = [context.run / "tokens" / shard_name(shard) for shard in range(-(-source.samples // size))]
        rank, world = distributed.rank(), distributed.world_size()
        own = range(rank * len(paths) // world, (rank + 1) * len(paths) // world)
        records = {shard: min(source.samples - shard * size, size) for shard in own}
        done = sum(count for shard, count in records.items() if paths[shard].exists())
        with context.reporter.progress(self.name, sum(records.values()), done, "image") as advance:
            for shard, count in records.items():
                if not paths[shard].exists():
                    samples = read(shard * size, shard * size + count, advance)
                    write_token_shard(paths[shard], *samples, tokenizer.layout())
        distributed.barrier()
        if rank == 0:
            self._finish(paths, tokenizer, source)

    def _source(self, tokenizer: Tokenizer) -> tuple[TokenSource, Read]:
        """What the tokens are of, and how to have those of the records from one to another."""
        stored = self.options.stored
        if stored is None:
            dataset = self.context.recipe.data.train.build()
            source = TokenSource(dataset.name, dataset.classes, self._views.names, len(dataset))
            return source, partial(self._encoded, tokenizer, dataset)

        def read(start: int, stop: int, advance: Callable[[int], None]) -> TokenSamples:
            samples = stored.read(tokenizer.layout(), start, stop)
            advance(stop - start)
            return samples

        return stored.source(), read

    @property
    def _views(self) -> Views:
        """Those of each image."""
        return Views(self.options.flip, self.options.ten_crops)

    @torch.inference_mode()
    def _encoded(
        self, tokenizer: Tokenizer, dataset: ImageDataset, start: int, stop: int, advance: Callable[[int], None]
    ) -> TokenSamples:
        layout, views, data = tokenizer.layout(), self._views, self.context.recipe.data
        keys: list[str] = []
        labels: list[int] = []
        tokens = [np.empty((0, len(views.names), layout.positions, layout.streams), np.int64)]
        for batch in read_images(
            dataset,
            tokenizer.preprocessing,
            self.options.batch_size,
            start,
            stop,
            max_undecodable=data.max_undecodable,
            warn=self.context.reporter.say,
            views=views,
            workers=data.workers,
        ):
            # View by view, so that as many images are encoded at once with many views as with one.
            encoded = [tokenizer.encode(view.to(self.context.device)) for view in batch.images.unbind(1)]
            tokens.append(torch.stack(encoded, dim=1).cpu().numpy())
            keys += batch.keys
            labels += batch.labels.tolist()
            advance(len(batch.keys))
        return TokenSamples(keys, np.concatenate(tokens), labels)

    def _finish(self, paths: list[Path], tokenizer: Tokenizer, source: TokenSource) -> None:
        """Write the file that says the shards are complete; undecodable images are not in them."""
        entries = tuple(ShardEntry(name=path.name, samples=len(index_shard(str(path)))) for path in paths)
        manifest = TokenManifest(
            layout=tokenizer.layout(),
            classes=source.classes,
            tokenizer=fingerprint(tokenizer, tokenizer.config()),
            dataset=source.name,
            samples=sum(entry.samples for entry in entries),
            views=source.views,
            shards=entries,
        )
        write_manifest(self.context.run / "tokens", manifest)
