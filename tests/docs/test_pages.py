"""Every code block of the documentation runs: page by page, from the first block to the last, in a folder of its own.

- `python`: executed, all blocks of a page in one namespace.
- `sh`: every command; smalti's run in this process, on small copies of the recipes (`smalti.core.shrink`) and few
  images. What installs things or runs tests is checked as far as it can be: names, extras, sessions, paths.
- `text` after one of these: what it prints, in which numbers may differ and `...` stands for anything.
- `yaml`: options of a component (`quantizer: ...`), or changes of the recipe `quickstart`.
- a block with `title="FILE"` is written to that file.
- a block of no language is a drawing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hatchling.builders.wheel import WheelBuilder
from typer.testing import CliRunner

from smalti.core.checkpoints import zoo
from smalti.core.commands import compare as compare_command
from smalti.core.plugins import KINDS, registry
from smalti.core.recipe import Recipe, find_recipe, load_recipe, merged, read_recipes
from smalti.core.shrink import shrunk
from smalti.eval import frechet
from smalti.gaussian.fitting import fit
from smalti.gaussian.fitting import folder as fit_folder

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "packages/*/README.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
# Commands that cannot run here, word for word, and why.
NOT_HERE = {
    "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node0:29500 "
    "-m smalti run quickstart --out runs/many": "needs two machines; the same on one machine runs above it",
}
# What a page takes for granted.
BEFORE = {
    "packages/quant/README.md": """
import torch
torch.manual_seed(0)
encoder, decoder = torch.nn.Linear(12, 8), torch.nn.Linear(8, 12)
batches = [torch.randn(2, 16, 12)] * 30
space = (16,)
""",
}
# What must be true after a page.
AFTER = {
    "packages/quant/README.md": """
assert loss < torch.nn.functional.mse_loss(decoder(encoder(batches[0]) * 0), batches[0]) * 1.2
assert torch.equal(codes, quantizer.decode(tokens, space))
""",
    "packages/eval/README.md": """
assert 0.5 < distance < 2  # 64 (0.1^2 + 0.1^2) and the chance of the draw
assert 0 <= shares.recall <= 1
assert abs(decibels - 46) < 1  # noise of 0.005 in [0, 1]
""",
    "packages/generation/README.md": """
assert drawn.shape == (10, 64, 1)
assert loss.item() > 0
""",
    "packages/core/README.md": """
import torch
from smalti.core.contracts import TokenizerOutput
output = TokenizerOutput(torch.zeros(3), torch.zeros(0), {})
assert SmoothL1Options(weight=2.0).build()(output, torch.ones(3), 0).item() == 0.5
assert [component.name for component in smalti_register()] == ["smooth-l1"]
""",
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")


class Block(NamedTuple):
    line: int
    language: str
    title: str
    code: str


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, lines = [], text.splitlines()
    start = None
    for number, line in enumerate(lines, 1):
        match = FENCE.match(line)
        if match is None:
            continue
        if start is None:
            start, info, indent = number, match["info"].strip(), len(match["indent"])
            continue
        code = "".join(f"{inside[indent:]}\n" for inside in lines[start : number - 1])
        language, _, rest = info.partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(start, language, title[1] if title else "", code))
        start = None
    assert start is None, f"line {start}: the block has no end"
    return found


def commands_of(code: str) -> list[str]:
    """The commands of a shell block, one a line, without comments."""
    joined = re.sub(r"\\\n\s*", "", code)
    stripped = [re.sub(r"(^|\s+)#( .*)?$", "", line).strip() for line in joined.splitlines()]
    return [command for line in stripped if line for command in line.split(" && ")]


def prints(shown: str, printed: str) -> bool:
    """Whether the lines shown are among those printed, in order; numbers may differ."""
    patterns = [
        re.sub(r"\d[\d.,]*(e-?\d+)?", lambda _: r"\d[\d.,]*(e-?\d+)?", re.escape(line.strip()).replace(r"\.\.\.", ".*"))
        for line in shown.splitlines()
        if line.strip()
    ]
    lines = iter([re.sub(r"\s+", " ", line.strip()) for line in printed.splitlines()])
    squeezed = [re.sub(r"(\\ )+", r"\\s+", pattern) for pattern in patterns]
    return all(any(re.fullmatch(pattern, line) for line in lines) for pattern in squeezed)


class Page:
    """One page on its way from block to block."""

    def __init__(self, name: str, folder: Path, module: ModuleType, images: dict[str, Any]) -> None:
        self.name, self.folder, self.images = name, folder, images
        self.namespace: dict[str, Any] = module.__dict__
        self.printed = ""

    def run(self, block: Block) -> None:
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
        elif block.language == "python":
            self.python(block.code, block.line)
        elif block.language == "sh":
            self.printed = "".join(self.command(command) for command in commands_of(block.code))
        elif block.language == "text":
            assert prints(block.code, self.printed), f"shown:\n{block.code}\nprinted:\n{self.printed}"
        elif block.language == "yaml":
            check_yaml(yaml.safe_load(block.code))
        elif block.language == "toml":
            tomllib.loads(block.code)
        else:
            assert block.language == "", f"a block of the language {block.language!r} cannot be run"
            assert not re.search(r"^(\$|smalti|pip|uv|torchrun) ", block.code, re.MULTILINE), "a drawing with commands"

    def python(self, code: str, line: int = 1) -> None:
        # Lines of an error are those of the page.
        compiled = compile("\n" * line + code, self.name, "exec")
        with redirect_stdout(StringIO()) as stdout:
            exec(compiled, self.namespace)
        self.printed = stdout.getvalue()

    def command(self, command: str) -> str:
        if command in NOT_HERE:
            return ""
        word, *arguments = shlex.split(command)
        if re.fullmatch(r"[A-Z_0-9]+=.*", word):
            name, _, value = word.partition("=")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(name, value)
                return self.command(command.partition(" ")[2])
        if word == "uv" and arguments[0] == "run":
            return self.command(shlex.join(arguments[1:]))
        runners: dict[str, Callable[[list[str]], str]] = {
            "smalti": smalti,
            "torchrun": self.torchrun,
            "pip": self.pip,
            "pytest": pytest_paths,
        }
        if word == "uvx" and arguments[0] == "nox":
            return nox_session(arguments[1:])
        assert word in runners, f"{command!r} is neither run, checked nor in NOT_HERE"
        return runners[word](arguments)

    def torchrun(self, arguments: list[str]) -> str:
        """In new processes, where recipes are not patched but asked to shrink, on few images."""
        images = json.dumps(self.images)
        changes = [f"data.{part}={images}" for part in ("train", "validation")]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments, *changes, "--shrink"]
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert run.returncode == 0, run.stderr
        return run.stdout

    def pip(self, arguments: list[str]) -> str:
        """Plugins of the page are built and made visible, nothing else is installed; names and extras must exist."""
        assert arguments[0] == "install"
        for requirement in arguments[1:]:
            if requirement == "-e":
                continue
            if (self.folder / requirement / "pyproject.toml").exists():
                self.make_visible(self.folder / requirement)
                continue
            match = re.fullmatch(r"([\w-]+)(?:\[([\w,-]+)\])?", requirement)
            assert match is not None, requirement
            if match[1] != "uv":
                extras = workspace()[match[1]]
                assert set((match[2] or "").split(",")) - {""} <= extras, f"{requirement}: there is {extras}"
        return ""

    def make_visible(self, source: Path) -> None:
        """Build the plugin's wheel and unpack it where Python looks."""
        site = self.folder / "site"
        (wheel,) = WheelBuilder(str(source)).build(directory=str(self.folder / "wheels"), versions=["standard"])
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        self.namespace["_visible"](site)
        registry.cache_clear()


def workspace() -> dict[str, set[str]]:
    """The distributions of this repository with their extras."""
    projects = [tomllib.loads(path.read_text())["project"] for path in ROOT.glob("packages/*/pyproject.toml")]
    projects.append(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    return {project["name"]: set(project.get("optional-dependencies", {})) for project in projects}


def smalti(arguments: list[str]) -> str:
    from smalti.core.cli import app

    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not (isinstance(result.exception, SystemExit) and result.exit_code == 0):
        raise result.exception
    return str(result.output)


def pytest_paths(arguments: list[str]) -> str:
    """Tests of this repository run by themselves: their paths must exist. Those that a page has written run."""
    for path in arguments:
        if Path(path).exists():
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
            assert run.returncode == 0, run.stdout + run.stderr
        elif "/" in path:
            assert (ROOT / path).exists(), f"there is no {path}"
    return ""


def nox_session(arguments: list[str]) -> str:
    """The session must exist; the paths after `--` too."""
    defined = set(re.findall(r"^def (\w+)\(session", (ROOT / "noxfile.py").read_text(), re.MULTILINE))
    ours, _, theirs = " ".join(arguments).partition(" -- ")
    asked = [name for name in ours.split() if not name.startswith("-")]
    assert set(asked) <= defined, f"{asked}: there are {sorted(defined)}"
    return pytest_paths([word for word in shlex.split(theirs) if word.startswith("packages/")]) if theirs else ""


def check_yaml(content: dict[str, Any]) -> None:
    """Options of components, by kind, or a recipe, whole or as changes of the quickstart's."""
    parts = {name: value for name, value in content.items() if name in KINDS and name not in Recipe.model_fields}
    for kind, value in parts.items():
        registry().options(kind, value["name"]).model_validate(value)
    rest = {name: value for name, value in content.items() if name not in parts}
    if rest:
        path, name = find_recipe("quickstart")
        Recipe.model_validate(merged(read_recipes(path)[name], rest))


@pytest.fixture
def page(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    few_images: dict[str, Any],
    published_file: Callable[[Any], Path],
    stock: Callable[[str], Path],
) -> Iterator[Page]:
    """A page in a folder that holds what its blocks name, among small recipes and without a network."""
    name = request.param
    text = (ROOT / name).read_text()
    spoken = "".join(block.code for block in blocks_of(text))
    monkeypatch.chdir(tmp_path)
    for item in request.getfixturevalue("stock_names"):
        if re.search(rf"(?<![\w/.-]){re.escape(item)}(?![\w-])", spoken):
            (tmp_path / item).parent.mkdir(parents=True, exist_ok=True)
            source = stock(item)
            shutil.copytree(source, tmp_path / item) if source.is_dir() else shutil.copy(source, tmp_path / item)
    if "evaluate images" in spoken or "evaluate stats" in spoken:
        monkeypatch.setenv("TORCH_HOME", str(request.getfixturevalue("torch_home")))
        # Of Inception's 2048 features it takes seconds for every distance; its own tests look at what it is.
        exact = frechet._trace_of_root
        quick = lambda a, b, tolerance: exact(a, b, tolerance) if len(a) < 512 else a.new_zeros(())  # noqa: E731
        monkeypatch.setattr(frechet, "_trace_of_root", quick)
    for variable in ("IMAGENET_ROOT", "DATASET_ROOT"):
        monkeypatch.delenv(variable, raising=False)

    def small(source: str | Path, overrides: Any = ()) -> Recipe:
        recipe = load_recipe(source, overrides)
        if Path(source).is_dir():
            return recipe
        copy = shrunk(recipe, tmp_path / "random", lambda sentence: None)
        content = copy.model_dump(mode="json") | {"name": recipe.name}
        for part in ("train", "validation"):
            if str(content["data"][part].get("shards", "")).startswith("embedded:"):
                content["data"][part] = few_images
        content["data"]["augment"] = None
        return Recipe.model_validate(content)

    monkeypatch.setattr("smalti.core.recipe.load_recipe", small)
    monkeypatch.setattr("smalti.core.compare.load_recipe", small)
    all_variants = compare_command.chosen_variants
    monkeypatch.setattr(compare_command, "chosen_variants", lambda path, only: all_variants(path, only)[:2])
    monkeypatch.setattr("smalti.core.step_time.ROUNDS", 1)
    monkeypatch.setattr(zoo, "fetch", published_file)
    options, wanted = fit.FitOptions, fit_folder.Wanted
    monkeypatch.setattr(fit, "FitOptions", lambda **given: options(**given | {"gaussians": 40, "steps": 4}))
    monkeypatch.setattr(fit_folder, "Wanted", lambda scale, bits, _, gif: wanted(scale, bits, 3, gif))
    module = ModuleType("page")
    module.__dict__["_visible"] = monkeypatch.syspath_prepend
    monkeypatch.setitem(sys.modules, "page", module)
    before, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)
    yield Page(name, tmp_path, module, few_images)
    torch.set_num_threads(threads)
    for imported in set(sys.modules) - before:
        if str(getattr(sys.modules[imported], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[imported]
    registry.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_the_blocks_of_a_page_run(page: Page) -> None:
    page.python(BEFORE.get(page.name, ""))
    for block in blocks_of((ROOT / page.name).read_text()):
        try:
            page.run(block)
        except BaseException as error:
            error.add_note(f"{page.name}, block at line {block.line}:\n{block.code}")
            raise
    page.python(AFTER.get(page.name, ""))


def test_what_cannot_run_is_still_in_the_pages() -> None:
    commands = {
        command
        for name in PAGES
        for block in blocks_of((ROOT / name).read_text())
        if block.language == "sh"
        for command in commands_of(block.code)
    }
    assert NOT_HERE.keys() <= commands


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = Page("none.md", tmp_path, ModuleType("page"), {})
    for command in (
        "smalti nosuch",
        "pip install smalti-mosaic",
        "uvx nox -s nosuch",
        "rm -rf /",
        "pytest packages/no",
    ):
        with pytest.raises((AssertionError, KeyError, SystemExit)):
            page.command(command)
    assert prints("psnr 12.3, usage 4\n", "first\npsnr 7.25, usage 100\n")
    assert not prints("psnr 12.3\n", "ssim 12.3\n")
    with pytest.raises(ValueError, match="codebook"):
        check_yaml({"quantizer": {"name": "vq", "dim": 8, "codebook": 4}})
