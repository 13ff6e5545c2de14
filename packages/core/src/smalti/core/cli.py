"""The command line. Nothing here imports torch before a command needs it."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalti.core.commands.arguments import Device, Force, Overrides, interruptible, with_seed
from smalti.core.commands.compare import run_compare
from smalti.core.commands.data import add_data_commands
from smalti.core.commands.evaluate import RECIPE, EvaluateGroup
from smalti.core.commands.models import add_model_commands
from smalti.core.commands.plugins import GroupWithPlugins
from smalti.core.commands.probe import run_probe
from smalti.core.errors import UserError
from smalti.core.plugins import PluginWarning, registry

if TYPE_CHECKING:
    from smalti.core.progress import Reporter
    from smalti.core.recipe import Recipe
    from smalti.core.run_folder import RunFolder
    from smalti.core.stage import Context

# In the order of the work, as `--help` lists them; typer has groups behind all commands.
ORDER = (
    *("quickstart", "run", "train", "tokenize", "sample", "evaluate", "compare", "reconstruct", "probe"),
    *("recipes", "zoo", "import", "export", "shards", "data", "plugins"),
)


class CommandLine(GroupWithPlugins):
    """All commands, those of plugins last."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names in the order of the work."""
        return sorted(super().list_commands(ctx), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


app = typer.Typer(
    name="smalti",
    cls=CommandLine,
    help="Image generation with discrete tokens, from images to evaluated samples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train a tokenizer or an autoencoder, or a generator on tokens.", no_args_is_help=True)
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
Out = Annotated[Path | None, typer.Option(help="The run folder.", show_default="runs/<recipe>")]
Seed = Annotated[int | None, typer.Option(help="The recipe's seed.", show_default="the recipe's")]
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
        _run_stages(recipe, overrides, out, device, seed, force=force, shrink=shrink, stage=stage)

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
        str | None, typer.Argument(metavar="RECIPE", help="As for `run`; none with --generator and --tokenizer.")
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
        if out is None:
            raise UserError("sample: without a recipe --out is needed, the folder for the samples")
        if force or shrink:
            raise UserError("sample: --force and --shrink go with a recipe, not with --generator and --tokenizer")
        from smalti.core.captions import read_prompts
        from smalti.core.sampling.pretrained import sample_pretrained, section

        with interruptible():
            sample_pretrained(
                generator,
                tokenizer,
                section(classes or "", [*([recipe] if recipe else []), *(overrides or [])]),
                out,
                device,
                seed=seed or 0,
                trace=trace,
                prompts=() if prompts is None else read_prompts(prompts),
                text_encoder=text_encoder,
            )
        return
    if prompts is not None or text_encoder is not None:
        raise UserError("sample: --prompts and --text-encoder go with --generator and --tokenizer, not with a recipe")
    if recipe is None:
        raise UserError("sample: give a recipe or a run folder, or --generator and --tokenizer")
    changes = [*(overrides or [])]
    if classes:
        from smalti.core.class_names import read_classes

        changes.append(f"sample.classes={json.dumps(read_classes(classes), ensure_ascii=False)}")
    then = _trace if trace else None
    _run_stages(recipe, changes, out, device, seed, force=force, shrink=shrink, stage="sample", then=then)


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    force: Force = False,
) -> None:
    """Do the main job on embedded data: images to tokens to new images, with a report."""
    _run_stages("quickstart", overrides, out, device, seed, force=force)


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
app.command("probe")(run_probe)
app.command("compare")(run_compare)


@interruptible()
def _run_stages(
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
) -> None:
    """Run one stage of a recipe, or all of them, and on the first process `then`, and tell where the results are."""
    from smalti.core.recipe import load_recipe
    from smalti.core.run_folder import RunFolder

    recipe = load_recipe(source, with_seed(overrides, seed))
    if out is None:
        out = Path(source) if Path(source).is_dir() else Path("runs") / (recipe.name + ("-shrunk" if shrink else ""))
    folder = RunFolder(out)

    from smalti.core import distributed
    from smalti.core.pipeline import Pipeline
    from smalti.core.progress import Reporter
    from smalti.core.stage import Context

    with distributed.joined(device) as device:
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
            if first:
                if then is not None:
                    then(context)
                _tell_results(out, stage)


def _tell_results(run: Path, stage: str | None) -> None:
    """Print the figures of a run and where to look, of what a stage made, or all of them."""
    if stage in (None, "evaluate") and (summary := run / "summary.json").exists():
        figures = json.loads(summary.read_text())
        typer.echo(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    for maker, title, name in (("sample", "samples", "samples/grid.png"), ("evaluate", "report", "report.html")):
        if stage in (None, maker) and (run / name).exists():
            typer.echo(f"{title + ':':8} {run / name}")


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
    from smalti.core.sampling.trace import save_trace
    from smalti.core.stages.sample import Sample

    save_trace(Sample(context).sampling(), context.run / "samples" / "trace.gif")


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
