"""`smalti sample --generator ... --tokenizer ...`: images from saved or published models, without a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smalti.core import distributed
from smalti.core.class_names import class_names, read_classes
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.errors import UserError, few
from smalti.core.files import TEMPORARY, read_json, remove_temporaries, write_json, write_text
from smalti.core.options import sentences
from smalti.core.overrides import apply_override, differences
from smalti.core.progress import Reporter
from smalti.core.recipe import SampleSection
from smalti.core.run_folder import RunFolder
from smalti.core.sampling.run import SamplingRun, chosen_classes
from smalti.core.sampling.trace import save_trace
from smalti.core.text_encoder import caption_features
from smalti.core.weights import fingerprint

FOLDER_TELLS = "sampling.json"
FIRST_FILES = ("state", f".{FOLDER_TELLS}{TEMPORARY}")  # what a process leaves that is killed at once
PER_CLASS = 4


def section(classes: str, overrides: Sequence[str]) -> SampleSection:
    """The options of a recipe's section `sample`.

    Args:
        classes: as `read_classes` takes them, or nothing for all.
        overrides: `sample.top_k=100`; images of each class are 4 where neither `sample.count` nor `sample.per_class`
            is given.

    Raises:
        UserError: an option that there is not, or a wrong value.
    """
    content: dict[str, Any] = {"sample": {}}
    for override in overrides:
        if not override.startswith("sample."):
            raise UserError(f"{override!r} is not of the section sample, the only one without a recipe")
        apply_override(content, override)
    given = content["sample"]
    if classes:
        given["classes"] = read_classes(classes)
    if "count" not in given:
        given.setdefault("per_class", PER_CLASS)
    try:
        return SampleSection.model_validate(given)
    except ValidationError as error:
        raise UserError(sentences(error, "sample")) from None


def sample_pretrained(
    generator: str,
    tokenizer: str,
    options: SampleSection,
    out: Path,
    device: str,
    *,
    seed: int = 0,
    trace: bool = False,
    prompts: Sequence[str] = (),
    text_encoder: str | None = None,
) -> None:
    """Draw images into a folder; the same call goes on where an earlier one was stopped.

    Args:
        generator: a folder, a name of the zoo, or a hub repository.
        tokenizer: the same.
        options: how many images, of which classes, and how.
        out: the folder.
        device: cpu, cuda, or auto.
        seed: as a recipe's.
        trace: also write `trace.gif`.
        prompts: for a generator of captions; they count as its classes, and `prompts.txt` lists them.
        text_encoder: in the place of the one that the generator names, see `caption_features`.

    Raises:
        UserError: models that do not belong together; classes or prompts that the generator does not take, or no text
            encoder; a folder with other samples, with something else, or in which another process works.
    """
    with distributed.joined(device) as device:
        first = distributed.rank() == 0
        reporter = Reporter(quiet=not first)
        with RunFolder(out).locked(first=first):
            run = _paired(generator, tokenizer, options, out, device, seed)
            if prompts or run.generator.captions is not None:
                run = _prompted(run, prompts, text_encoder)
            if _is_done(run, text_encoder):
                reporter.say("sample: done before")
            else:
                run.draw(reporter)
            if trace and first:
                save_trace(run, out / "trace.gif")


def _paired(generator: str, tokenizer: str, options: SampleSection, out: Path, device: str, seed: int) -> SamplingRun:
    decoder, model = Tokenizer.from_pretrained(tokenizer), Generator.from_pretrained(generator)
    ours, theirs = model.token_layout, decoder.layout()
    if (ours.kind, ours.vocab) != (theirs.kind, theirs.vocab):
        raise UserError(f"{generator} and {tokenizer} do not belong together: {ours} there, {theirs} here")
    model.attach(decoder)
    names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    if model.captions is None:
        names = class_names(generator, model.classes)
        labels = chosen_classes(options.classes, model.classes, names)
    return SamplingRun(decoder.to(device), model.to(device).eval(), options, labels, out, device, seed, names)


def _prompted(run: SamplingRun, prompts: Sequence[str], text_encoder: str | None) -> SamplingRun:
    """The run with prompts in the place of classes."""
    captions, name = run.generator.captions, run.generator.options.name
    if captions is None:
        raise UserError(f"the generator {name!r} draws classes, not captions: give --classes in the place of --prompts")
    if run.options.classes:
        raise UserError(f"the generator {name!r} draws captions, not classes: leave --classes out")
    if not prompts:
        run.check_condition()
    features = caption_features(prompts, captions, text_encoder, run.device)
    return replace(run, labels=tuple(range(len(prompts))), names=tuple(prompts), features=features)


def _is_done(run: SamplingRun, text_encoder: str | None) -> bool:
    """Whether the folder holds all of these samples; the first process makes it ready for them."""
    path = run.folder / FOLDER_TELLS
    done = (run.folder / "samples.npz").exists() and not (run.folder / "chunks").exists()
    content = {
        "generator": fingerprint(run.generator, run.generator.config()),
        "tokenizer": fingerprint(run.tokenizer, run.tokenizer.config()),
        "seed": run.seed,
        "sample": run.options.model_dump(mode="json"),
    }
    captions = run.generator.captions
    if captions is not None:
        content |= {"prompts": list(run.names), "text_encoder": text_encoder or captions.encoder}
    if path.exists():
        found = differences(read_json(path, "what samples were drawn"), content)
        if found:
            told = few(found, 5, between="; ")
            raise UserError(f"{run.folder} holds other samples ({told}): choose another with --out")
    elif run.folder.is_dir() and any(path.name not in FIRST_FILES for path in run.folder.iterdir()):
        raise UserError(f"{run.folder} is not empty and holds no samples: choose another with --out")
    distributed.barrier()
    if distributed.rank() == 0:
        remove_temporaries(run.folder)
        if not done:
            write_json(path, content)
            if captions is not None:
                write_text(run.folder / "prompts.txt", "\n".join(run.names) + "\n")
    return done
