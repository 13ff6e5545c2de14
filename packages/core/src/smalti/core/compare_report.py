"""What `smalti compare` writes: a table for people, the same for programs, and a picture.

    comparison.md    a row for each variant
    comparison.json  the same figures, how they were defined and made
    comparison.png   held-out images in the first row, below it what each variant makes of them

Legend: N images, H W pixels, R rows.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from smalti.core.codebook_health import PERPLEXITY_DEFINITION, USAGE_DEFINITION
from smalti.core.compare import Comparison
from smalti.core.data.images import GAP, VISIBLE_OF_MANY, enlargement, grid, png_bytes
from smalti.core.files import write_bytes, write_json, write_text

FONT_SIZE, MARGIN = 14, 8


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Write the files of this module's head to `folder`."""
    content = as_data(comparison)
    write_json(folder / "comparison.json", content)
    write_text(folder / "comparison.md", as_markdown(content))
    if comparison.measured:
        first = next(iter(comparison.measured.values()))
        rows = {"original": first.originals} | {name: found.copies for name, found in comparison.measured.items()}
        write_bytes(folder / "comparison.png", png_bytes(labelled(rows)))
    else:
        (folder / "comparison.png").unlink(missing_ok=True)


def as_data(comparison: Comparison) -> dict[str, Any]:
    """All figures as plain data."""
    definitions = {name: f"{metric.definition}; unit: {metric.unit}" for name, metric in comparison.metrics.items()}
    return {
        "table": comparison.table,
        "overrides": list(comparison.overrides),
        "device": comparison.device,
        "device_name": _processor(comparison.device),
        "threads": torch.get_num_threads(),
        "versions": {
            "smalti-core": metadata.version("smalti-core"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "units": {name: metric.unit for name, metric in comparison.metrics.items()},
        "definitions": definitions | {"usage": USAGE_DEFINITION, "perplexity": PERPLEXITY_DEFINITION},
        "variants": {name: _variant(comparison, name) for name in comparison.measured},
        "failures": comparison.failures,
    }


def _variant(comparison: Comparison, name: str) -> dict[str, Any]:
    found, step = comparison.measured[name], comparison.times[name]
    training = found.recipe.train.tokenizer
    assert training is not None
    return {
        "summary": found.recipe.summary,
        **found.metrics,
        "usage": found.usage,
        "perplexity": found.perplexity,
        "tokens": found.layout,
        "bits": found.bits,
        "parameters": found.parameters,
        "images": found.images,
        "seed": found.recipe.seed,
        "steps": training.steps,
        "batch_size": training.batch_size,
        "step": {"seconds": step.seconds, "clock": step.clock, "updates": step.updates},
    }


def as_markdown(content: dict[str, Any]) -> str:
    """The table of `as_data`, with how it was made."""
    variants, units = content["variants"], content["units"]
    titles = [
        "variant",
        *(name if unit == "1" else f"{name}, {unit}" for name, unit in units.items()),
        *("usage", "perplexity", "bits an image", "parameters", "updates x images", "ms an update"),
    ]
    rows = [
        [
            name,
            *("" if found[metric] is None else f"{found[metric]:.4g}" for metric in units),
            " / ".join(f"{share:.1%}" for share in found["usage"]),
            " / ".join(f"{value:.4g}" for value in found["perplexity"]),
            f"{found['bits']:g}",
            f"{found['parameters']:,}",
            f"{found['steps']} x {found['batch_size']}",
            f"{found['step']['seconds'] * 1e3:.3g}",
        ]
        for name, found in variants.items()
    ]
    rows += [[name, "failed", *[""] * (len(titles) - 2)] for name in content["failures"]]
    lines = [f"# {content['table']}", "", *_made(content), "", *_table(titles, rows), ""]
    lines += [f"- {name}: {found['summary']}" for name, found in variants.items()]
    lines += [f"- {name} failed: {sentence}" for name, sentence in content["failures"].items()]
    return "\n".join(lines) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(titles) - 1)]
    return [f"| {' | '.join(row)} |" for row in (titles, rule, *rows)]


def _made(content: dict[str, Any]) -> list[str]:
    """How the figures were made, in sentences."""
    variants = content["variants"].values()
    images, seeds = (" or ".join(map(str, sorted({found[key] for found in variants}))) for key in ("images", "seed"))
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    made = f"On {content['device']} ({content['device_name']}), {threads}, {versions}."
    if not variants:
        return [made]
    step = next(iter(variants))["step"]
    lines = [
        f"One run of each, seed {seeds}, measured on the first {images} held-out images, with averaged weights where "
        f"there are any. {made}",
        f"The time of an update is the median of {step['updates']} by {step['clock']}, with random images and without "
        "reading data, the variants in turns in one process.",
    ]
    if content["overrides"]:
        lines.append(f"Overrides: {', '.join(f'`{override}`' for override in content['overrides'])}.")
    return lines


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = [line for line in _cpu_facts() if line.startswith("model name")]
    return model[0].partition(":")[2].strip() if model else platform.machine()


def _cpu_facts() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def labelled(rows: dict[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Rows of images with their names before them, uint8 `(H', W', 3)`.

    Args:
        rows: by name, uint8 `(N, H, W, 3)`; smaller images than the largest are in the upper left of their places.
    """
    count, height, width = (max(images.shape[axis] for images in rows.values()) for axis in range(3))
    places = np.full((len(rows), count, height, width, 3), 255, np.uint8)
    for row, images in zip(places, rows.values(), strict=True):
        row[: images.shape[0], : images.shape[1], : images.shape[2]] = images
    scale = enlargement((height, width), VISIBLE_OF_MANY)
    pictures = grid(places.reshape(-1, height, width, 3), count, scale)
    font = ImageFont.load_default(FONT_SIZE)
    left = MARGIN * 2 + int(max(font.getlength(name) for name in rows))
    canvas = Image.new("RGB", (left + pictures.shape[1], pictures.shape[0]), "white")
    canvas.paste(Image.fromarray(pictures), (left, 0))
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(rows):
        middle = index * (height * scale + GAP) + height * scale // 2
        draw.text((MARGIN, middle), name, fill="black", font=font, anchor="lm")
    return np.asarray(canvas)
