"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from smalti.core.compare_command import add_compare_command
from smalti.core.data_commands import add_data_commands
from smalti.core.errors import UserError
from smalti.core.evaluate_command import RECIPE, EvaluateGroup
from smalti.core.model_commands import add_model_commands
from smalti.core.plugin_commands import GroupWithPlugins
from smalti.core.plugins import PluginWarning, registry
from smalti.core.probe_command import add_probe_command

if TYPE_CHECKING:
    from smalti.core.progress import Reporter
    from smalti.core.recipe import Recipe
    from smalti.core.run_folder import RunFolder
    from smalti.core.stage import Context

T = TypeVar("T")

app = typer.Typer(
    name="smalti",
    cls=GroupWithPlugins,
    help="Image generation with discrete tokens, from images to evaluated samples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train a tokenizer, or a generator on its tokens.", no_args_is_help=True)
app.add_typer(train, name="train")
evaluate = typer.Typer(cls=EvaluateGroup, help="Measure a recipe's run, or images of any origin.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A name that `smalti recipes` lists, a YAML file (FILE:NAME of a table), or a run folder.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[PATH=VALUE]...", help="Options of the recipe, by dotted path.")
]
Out = Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/<recipe>")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Seed = Annotated[int | None, typer.Option(help="The recipe's seed.", show_default="the recipe's")]
Force = Annotated[bool, typer.Option("--force", help="Redo what depends on a changed recipe.")]
Shrink = Annotated[
    bool, typer.Option("--shrink", help="Run a tiny copy of the recipe, with all its losses, in seconds on a CPU.")
]


@app.callback()
def options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a user's mistake.")] = False,
) -> None:
    """Take what all commands share; `main` reads `--debug` from the arguments."""


def _add_command(group: typer.Typer, name: str, summary: str, stage: str | None = None) -> None:
    """Add a command that runs one stage of a recipe, or all of them, in its run folder."""

    def command(
        recipe: RecipeArgument,
        overrides: Overrides = None,
        out: Out = None,
        device: Device = "auto",
        seed: Seed = None,
        force: Force = False,
        shrink: Shrink = False,
    ) -> None:
        _run(recipe, overrides, out, device, seed, force=force, shrink=shrink, stage=stage)

    group.command(name, help=summary)(command)


_add_command(app, "run", "Run all stages of a recipe; what is done and unchanged is skipped.")
_add_command(train, "tokenizer", "Train the recipe's tokenizer on its images.", "train-tokenizer")
_add_command(train, "autoencoder", "Train the recipe's autoencoder on its images.", "train-autoencoder")
_add_command(app, "tokenize", "Turn the training images into token shards.", "tokenize")
_add_command(train, "generator", "Train the recipe's generator on the token shards.", "train-generator")
_add_command(evaluate, RECIPE, "Measure reconstructions and samples of a run, and write the report.", "evaluate")


@app.command()
def sample(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="As for `run`; none with --generator and --tokenizer.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    force: Force = False,
    shrink: Shrink = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Also write trace.gif: the order in which tokens appear.")
    ] = False,
    generator: Annotated[
        str | None, typer.Option(help="A folder, a name of the zoo, or a hub repository, without a recipe.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The same.")] = None,
    classes: Annotated[
        str | None, typer.Option(metavar="CLASS,...", help="Which, by number or name.", show_default="all")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="TEXT|FILE", help="For a generator of captions: a text, or a file with one on each line."),
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="A folder or hub repository of a T5.", show_default="the one the generator names")
    ] = None,
) -> None:
    """Draw images of classes or captions: a PNG grid, an .npz, and files where asked for."""
    if (generator is None) != (tokenizer is None):
        raise UserError("sample: --generator and --tokenizer belong together: give both, or a recipe")
    if generator is not None and tokenizer is not None:
        changes = [*([recipe] if recipe else []), *(overrides or [])]
        if out is None:
            raise UserError("sample: without a recipe --out is needed, the folder for the samples")
        how = {"seed": seed or 0, "trace": trace, "text_encoder": text_encoder}
        _interruptible(
            lambda: _sample_pretrained(generator, tokenizer, classes or "", changes, out, device, prompts, how)
        )
        return
    if prompts is not None or text_encoder is not None:
        raise UserError("sample: --prompts and --text-encoder go with --generator and --tokenizer, not with a recipe")
    if recipe is None:
        raise UserError("sample: give a recipe or a run folder, or --generator and --tokenizer")
    changes = [*(overrides or []), *([f"sample.classes=[{classes}]"] if classes else [])]
    _run(recipe, changes, out, device, seed, force=force, shrink=shrink, stage="sample", then=_trace if trace else None)


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    force: Force = False,
) -> None:
    """Do the main job on embedded data: images to tokens to new images, with a report."""
    folder = _run("quickstart", overrides, out, device, seed, force=force)
    if folder is not None:
        summary = json.loads((folder / "summary.json").read_text())
        figures = ", ".join(f"{name} {value:.4g}" for name, value in summary.items())
        typer.echo(f"{figures}\nsamples: {folder / 'samples' / 'grid.png'}\nreport:  {folder / 'report.html'}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one as YAML, with all that it leaves unsaid.")] = None,
) -> None:
    """List the recipes that are installed, with what their sources publish."""
    from smalti.core.recipe import composed, dump_recipe, load_recipe, published, read_recipes, shipped_recipes

    if name is not None:
        typer.echo(dump_recipe(load_recipe(name)), nl=False)
        return
    shipped = shipped_recipes()
    contents = {path: read_recipes(path) for path in set(shipped.values())}
    for known, path in shipped.items():
        content = published(composed(contents[path].get(known) or contents[path][""]))
        typer.echo(f"{known:36} {content['summary']}" + (f" ({source})" if (source := content.get("source")) else ""))
        figures = ", ".join(f"{figure} {value:g}" for figure, value in (content.get("figures") or {}).items())
        facts = [figures, f"checkpoint {content['checkpoint']}" if content.get("checkpoint") else ""]
        if any(facts):
            typer.echo(f"{'':36} {'; '.join(fact for fact in facts if fact)}")


@app.command()
def plugins(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 if a plugin is broken or a name is taken twice.")
    ] = False,
) -> None:
    """List what is installed: kind, name, distribution, version, status."""
    found = registry().plugins()
    duplicates = registry().duplicates()
    if as_json:
        content = [
            {
                "plugin": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "status": plugin.status,
                "error": plugin.error,
                "components": [
                    {"kind": component.kind, "name": component.name, "summary": component.summary}
                    for component in plugin.components
                ],
            }
            for plugin in found
        ]
        typer.echo(json.dumps(content, indent=2))
    else:
        for plugin in found:
            typer.echo(
                f"{plugin.distribution} {plugin.version}: {plugin.status}"
                + (f", {plugin.error}" if plugin.error else "")
            )
            for component in plugin.components:
                typer.echo(f"  {component.kind:14} {component.name:20} {component.summary}")
        for sentence in duplicates:
            typer.echo(f"registered twice: {sentence}")
    if check and (duplicates or any(plugin.status == "failed" for plugin in found)):
        raise typer.Exit(1)


add_model_commands(app)
add_data_commands(app)
add_probe_command(app)
add_compare_command(app)


def _run(
    source: str,
    overrides: list[str] | None,
    out: Path | None,
    device: str,
    seed: int | None,
    *,
    force: bool,
    shrink: bool = False,
    stage: str | None = None,
    then: Callable[[Context], None] | None = None,
) -> Path | None:
    """Run one stage of a recipe, or all of them; return the run folder, on the first process only.

    `then` is what the first process does afterwards.
    """
    return _interruptible(
        lambda: _run_stages(source, overrides, out, device, seed, force=force, shrink=shrink, stage=stage, then=then)
    )


def _interruptible(work: Callable[[], T]) -> T:
    try:
        return work()
    except KeyboardInterrupt:
        print("smalti: interrupted; the same command goes on from here", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None


def _run_stages(
    source: str,
    overrides: list[str] | None,
    out: Path | None,
    device: str,
    seed: int | None,
    *,
    force: bool,
    shrink: bool,
    stage: str | None,
    then: Callable[[Context], None] | None,
) -> Path | None:
    from smalti.core.recipe import load_recipe
    from smalti.core.run_folder import RunFolder

    changes = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    recipe = load_recipe(source, changes)
    if out is None:
        out = Path(source) if Path(source).is_dir() else Path("runs") / (recipe.name + ("-shrunk" if shrink else ""))
    folder = RunFolder(out)

    from smalti.core import distributed
    from smalti.core.pipeline import Pipeline
    from smalti.core.progress import Reporter
    from smalti.core.stage import Context

    device = distributed.device_name(device)
    distributed.initialise(device)
    try:
        first = distributed.rank() == 0
        with folder.locked(first=first):
            reporter = Reporter(quiet=not first)
            if shrink:
                recipe = _shrunk(recipe, folder, reporter)
            if first:
                folder.prepare(recipe, force=force)
            distributed.barrier()
            context = Context(folder, recipe, device, reporter)
            Pipeline(context).run([stage] if stage else None)
            if then is not None and first:
                then(context)
        return out if first else None
    finally:
        distributed.finish()


def _shrunk(recipe: Recipe, folder: RunFolder, reporter: Reporter) -> Recipe:
    """The tiny copy; the first process writes the files of random weights that it needs, the others find them."""
    from smalti.core import distributed
    from smalti.core.shrink import shrunk

    for rank in (0, 1):
        if min(distributed.rank(), 1) == rank:
            recipe_of_rank = shrunk(recipe, folder.state / "random", reporter.say)
        distributed.barrier()
    return recipe_of_rank


def _trace(context: Context) -> None:
    from smalti.core.sampling_trace import save_trace
    from smalti.core.stages.sample import Sample

    save_trace(Sample(context).sampling(), context.run / "samples" / "trace.gif")


def _sample_pretrained(
    generator: str,
    tokenizer: str,
    classes: str,
    changes: list[str],
    out: Path,
    device: str,
    prompts: str | None,
    how: dict[str, Any],
) -> None:
    from smalti.core.captions import read_prompts
    from smalti.core.sampling_pretrained import sample_pretrained, section

    texts = () if prompts is None else read_prompts(prompts)
    sample_pretrained(generator, tokenizer, section(classes, changes), out, device, prompts=texts, **how)


def main() -> None:
    """The entry point: a user's mistake is one line on standard error and exit code 2."""
    warnings.showwarning = _show_warning
    logging.getLogger("smalti").addHandler(_LogLines(logging.INFO))
    logging.getLogger("smalti").setLevel(logging.INFO)
    # GNU OpenMP spins at every barrier; where cores are shared with other work, two threads then wait for each
    # other's time slices: measured 80 times slower. With a short spin it costs nothing on quiet cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        app()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"smalti: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


class _LogLines(logging.Handler):
    """What our packages log, as lines on standard error; of several processes the first tells."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line, through whatever stands for standard error now: perhaps a progress bar."""
        if os.environ.get("RANK", "0") == "0":
            print(record.getMessage(), file=sys.stderr)  # noqa: T201


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    """One line for a broken plugin; Python's form for all else."""
    if issubclass(category, PluginWarning):
        text = f"smalti: warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    sys.stderr.write(text)
