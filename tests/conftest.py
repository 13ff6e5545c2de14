import io
import os
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from smalti.core.cli import app
from smalti.core.errors import UserError
from smalti.core.plugins import registry

# The quickstart in seconds: the same components and stages, less of everything.
SHRUNK = (
    "tokenizer.encoder.widths=[8, 16]",
    "tokenizer.decoder.widths=[8, 16]",
    "tokenizer.quantizer.codebook_size=32",
    "generator.layers=2",
    "generator.dim=32",
    "generator.heads=2",
    "train.tokenizer.steps=60",
    "train.tokenizer.batch_size=16",
    "train.tokenizer.checkpoint_every=10",
    "train.tokenizer.log_every=10",
    "train.generator.steps=60",
    "train.generator.batch_size=16",
    "train.generator.checkpoint_every=10",
    "train.generator.log_every=10",
    "tokenize.shard_size=1500",
    "sample.count=200",
    "sample.batch_size=10",
    "evaluate.classifier.steps=40",
    "evaluate.classifier.width=8",
    "evaluate.classifier.checkpoint_every=10",
    "evaluate.classifier.log_every=10",
)
OUTPUTS = ("recipe.yaml", "tokenizer", "tokens", "generator", "samples", "metrics.jsonl", "evaluation")


@pytest.fixture(autouse=True, scope="module")
def only_what_is_installed():
    """Without the toy plugin, whose folder tests of core leave on the import path; for fixtures of modules, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMALTI_PLUGINS", "-toy")
        registry.cache_clear()
        yield
    registry.cache_clear()


@pytest.fixture(autouse=True)
def fresh_registry():
    registry.cache_clear()
    yield
    registry.cache_clear()


class CommandLine:
    """Runs smalti in a folder; one thread, so that one process and two compute the same bits."""

    def __init__(self, folder):
        self.folder = folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    def start(self, *arguments, launcher=("-m", "smalti")):
        command = [sys.executable, *launcher, *map(str, arguments)]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __call__(self, *arguments, launcher=("-m", "smalti"), code=0):
        process = self.start(*arguments, launcher=launcher)
        try:
            stdout, stderr = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert process.returncode == code, f"{arguments}: exit {process.returncode}\n{stdout}\n{stderr}"
        return stdout, stderr

    def two(self, *arguments, code=0):
        """The same in two processes that share the work."""
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smalti")
        return self(*arguments, launcher=launcher, code=code)


@pytest.fixture
def smalti(tmp_path):
    return CommandLine(tmp_path)


@pytest.fixture
def undisturbed(tmp_path_factory):
    """The command line in another folder, for what a test compares with."""
    return CommandLine(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an undisturbed run of the shrunk quickstart. Tests copy from it and leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    CommandLine(folder)("quickstart", *SHRUNK, "--out", "run")
    return folder / "run"


@pytest.fixture
def shrunk():
    return SHRUNK


@pytest.fixture(scope="session")
def files():
    """Every output file of a run that holds no time, with its bytes."""

    def files(run):
        found = {}
        for name in OUTPUTS:
            for file in [run / name] if (run / name).is_file() else sorted((run / name).rglob("*")):
                if file.is_file():
                    found[str(file.relative_to(run))] = file.read_bytes()
        return found

    return files


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """Two tar files, train and validation, of twelve pictures of two classes each; WDS_TINY names their folder."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for name in ("train", "validation"):
        with tarfile.open(folder / f"{name}-0000.tar", "w") as tar:
            for index in range(12):
                darkest = 100 * (index % 2)
                picture = io.BytesIO()
                Image.fromarray(random.integers(darkest, darkest + 100, (32, 32, 3), np.uint8)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index:04d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WDS_TINY", str(folder))
        yield


@pytest.fixture(scope="session")
def in_small(tiny_shards):
    """Run a command on a recipe, in this process, shrunken and with tiny pictures; its exit code and what it said."""
    data = [
        f"data.{part}={{name: webdataset, shards: '${{TINY}}/{part}-*.tar', classes: [dark, light]}}"
        for part in ("train", "validation")
    ]

    def in_small(*command, out):
        options = (*data, "tokenize.shard_size=5", "--shrink", "--device", "cpu", "--out", str(out))
        result = CliRunner().invoke(app, [*command, *options])
        if isinstance(result.exception, UserError):
            return 2, str(result.exception)
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        return result.exit_code, result.output

    return in_small
