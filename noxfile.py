"""Every check of the project: `uvx nox` runs those of CI, `uvx nox -l` lists all.

Needs uv; each session has an environment of its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "types", "tests", "packages", "docs"]

PACKAGES = ("core", "quant", "gaussian", "generation", "eval")
# What a distribution's own tests need beside pytest: extras of core that the package does not require itself.
EXTRAS = {"core": "[arrow,pretrained,train,turbo,test]", "eval": "[pipeline,pretrained]", "gaussian": "[cpu,fit]"}
# Trackers with many dependencies of their own, which no test needs.
WITHOUT = ("--no-extra", "trackio", "--no-extra", "wandb")
TEST_NEEDS = ("pytest>=8.3", "hypothesis>=6.100", "pytest-benchmark>=5.1", "pytest-xdist>=3.6")
# A process of one thread per core; the tests of a file share one, and with it what they prepare.
PARALLEL = ("-n", "auto", "--dist", "loadfile")
# Hundreds of processes import torch: what they compile is kept, wherever the environment says otherwise.
OF_TESTS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}


def sync(session: nox.Session, *arguments: str) -> None:
    """Make the session's environment the locked workspace."""
    session.run_install(
        "uv", "sync", "--quiet", *arguments, env={"UV_PROJECT_ENVIRONMENT": session.virtualenv.location}
    )


@nox.session
def tests(session: nox.Session) -> None:
    """All tests of the workspace; arguments go to pytest, e.g. `-- -m "not slow"`."""
    sync(session, "--all-packages", "--all-extras", *WITHOUT, "--group", "test")
    session.run("pytest", "-m", "not gpu", *PARALLEL, *session.posargs, env=OF_TESTS)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, spelling, and who may import whom."""
    sync(session, "--all-packages", "--group", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, over packages and examples."""
    sync(session, "--all-packages", "--all-extras", *WITHOUT, "--group", "types", "--group", "test")
    names = (*(f"smalti.{package}" for package in PACKAGES), "smalti_example_tokenizer")
    session.run("mypy", *(argument for name in names for argument in ("-p", name)))


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into site/; a warning is an error."""
    sync(session, "--all-packages", "--all-extras", *WITHOUT, "--group", "docs")
    session.run("mkdocs", "build", "--strict", "--quiet", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def packages(session: nox.Session, package: str) -> None:
    """Build the wheels, install one distribution with what it declares, run its own tests outside the tree.

    Parity cases are left to the session `tests`: they ask for numbers, and this one for what is missing.
    """
    wheels = Path(session.create_tmp()) / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    for name in {"core", package}:
        session.run_install("uv", "build", "--quiet", "--wheel", f"packages/{name}", "--out-dir", str(wheels))
    constraints = Path(session.create_tmp()) / "constraints.txt"
    project = nox.project.load_toml("pyproject.toml")
    constraints.write_text("\n".join(project["tool"]["uv"]["constraint-dependencies"]) + "\n")
    (wheel,) = wheels.glob(f"smalti_{package}-*.whl")
    core = wheels.glob("smalti_core-*.whl")
    session.install(
        f"smalti-{package}{EXTRAS.get(package, '')} @ {wheel.resolve().as_uri()}",
        *(f"smalti-core @ {path.resolve().as_uri()}" for path in core if package != "core"),
        *TEST_NEEDS,
        "--constraint",
        str(constraints),
    )
    outside = Path(session.create_tmp()) / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    shutil.copytree(Path("packages") / package, outside, ignore=shutil.ignore_patterns("src", "__pycache__"))
    config = Path("pyproject.toml").resolve()
    with session.chdir(outside):
        installed = session.run(
            "python", "-c", f"import smalti.{package} as package; print(package.__file__)", silent=True
        )
        if "site-packages" not in str(installed):
            session.error(f"smalti.{package} was imported from the source tree: {installed}")
        where = ("-c", str(config), "--rootdir", ".")
        session.run(
            "pytest", *where, "-m", "not gpu and not parity", "tests", *PARALLEL, *session.posargs, env=OF_TESTS
        )


@nox.session
def benchmark(session: nox.Session) -> None:
    """Every hot path by turns with its peers, against the stored ratios; `-- --update` stores the new ones.

    Other arguments go to pytest: `-- -k rasterize`, `-- --rounds 2` for a quick look.
    """
    sync(session, "--all-packages", "--all-extras", *WITHOUT, "--group", "test", "--group", "benchmark")
    raw = Path(session.create_tmp()) / "raw.json"
    raw.unlink(missing_ok=True)
    update = [argument for argument in session.posargs if argument == "--update"]
    selection = [argument for argument in session.posargs if argument not in update]
    folders = (*(f"packages/{name}/benchmarks" for name in PACKAGES), "benchmarks")
    try:
        session.run("pytest", *folders, f"--benchmark-json={raw}", "--benchmark-columns=rounds", *selection)
    finally:  # one that fails leaves the ratios of the others
        if raw.exists() and raw.stat().st_size:
            session.run("python", "benchmarks/ratios.py", str(raw), *update)


@nox.session
def quickstart(session: nox.Session) -> None:
    """The README's first command, at full size, into runs/quickstart."""
    sync(session)
    session.run("smalti", "quickstart", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests marked `gpu`, in the current interpreter, which must have torch with CUDA and the packages' needs.

    Nothing is installed, so that it works on a machine without a network; entry points come from metadata written
    for this run.
    """
    metadata = Path(".nox", "gpu").resolve()
    for name in PACKAGES:
        project = nox.project.load_toml(Path("packages", name, "pyproject.toml"))["project"]
        info = metadata / f"smalti_{name}-{project['version']}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: smalti-{name}\nVersion: {project['version']}\n")
        (info / "entry_points.txt").write_text(f"[smalti]\n{name} = {project['entry-points']['smalti'][name]}\n")
    paths = [str(metadata), *(str(Path("packages", name, "src").resolve()) for name in PACKAGES)]
    session.run("python", "-m", "pytest", "-m", "gpu", *session.posargs, env={"PYTHONPATH": os.pathsep.join(paths)})
