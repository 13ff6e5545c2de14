"""Disks that are full, and folders that cannot be written: one sentence, nothing lost, and the run goes on later."""

import errno
import json
import os
import resource
import signal
import sys

import pytest

pytestmark = pytest.mark.slow
SYSTEM = "vqvae-ar"
STAGES = ("train-tokenizer", "tokenize", "train-generator", "sample", "evaluate")
COMMANDS = {
    "train-tokenizer": ("train", "tokenizer"),
    "tokenize": ("tokenize",),
    "train-generator": ("train", "generator"),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
}
# What each stage writes; all of them write below state/.
OUTPUTS = {
    "train-tokenizer": "tokenizer",
    "tokenize": "tokens",
    "train-generator": "generator",
    "sample": "samples",
    "evaluate": "evaluation",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Disk:
    """Refuses to open files for writing and to make or rename them, where and for as long as a test wants it.

    Python tells hooks what it is about to open, so that even root is refused. A hook stays for as long as the process.
    """

    def __init__(self):
        self.refuses = None
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.refuses is None or event not in ("open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or (event == "open" and not arguments[2] & WRITING):
            return
        if event == "os.mkdir" and os.path.exists(path):  # noqa: PTH110  # a Path would raise events of its own
            return
        refuses, self.refuses = self.refuses, None  # what the test does to find out is not refused
        try:
            number = refuses(os.fspath(path))
        finally:
            self.refuses = refuses
        if number:
            raise OSError(number, os.strerror(number), os.fspath(path))


@pytest.fixture(scope="module")
def hook():
    return Disk()


@pytest.fixture
def disk(hook):
    yield hook
    hook.refuses = None


@pytest.fixture(scope="module")
def whole(in_small, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    code, said = in_small("run", SYSTEM, out=folder)
    assert code == 0, said
    return folder


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def current(run):
    """The stage that was begun last."""
    path = run / "state" / "stages.json"
    return list(json.loads(path.read_text()))[-1] if path.exists() else None


def check_kept(before, after):
    """Whatever was there is there; the file of curves may have grown."""
    for name, content in before.items():
        assert after[name] == content or (name == "metrics.jsonl" and after[name].startswith(content)), name


def test_a_disk_that_is_full_again_and_again(disk, whole, run, in_small, files):
    """The first process may write nothing, each later one a file more; in the end it is the undisturbed run."""
    refused = []
    for allowed in range(100):
        left = allowed

        def refuses(path):
            nonlocal left
            left -= path.startswith(str(run))
            return errno.ENOSPC if left < 0 else 0

        disk.refuses = refuses
        code, said = in_small("run", SYSTEM, out=run)
        disk.refuses = None
        if code == 0:
            break
        assert said.startswith("no disk space left to write "), said
        assert said.endswith(": free some and run the same command again")
        refused.append(current(run))
    assert code == 0, said
    assert set(refused) == {None, *STAGES}
    assert files(run) == files(whole)


@pytest.mark.parametrize("limit", [0, 4096])
def test_files_that_may_not_grow(whole, run, in_small, files, limit):
    """In the middle of writing, as on a full disk; in every stage."""
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = files(whole)
    try:
        for stage in STAGES:
            before = files(run)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            code, said = in_small(*COMMANDS[stage], SYSTEM, out=run)
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert code == 2, stage
            assert said.startswith(str(run)), said
            assert said.endswith(" cannot be written: File too large"), said
            check_kept(before, files(run))
            code, said = in_small(*COMMANDS[stage], SYSTEM, out=run)
            assert code == 0, said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert files(run) == expected


def test_folders_that_may_only_be_read(disk, whole, run, in_small, files):
    """The whole run folder, then the part of it that a stage writes."""
    for stage in STAGES:
        for folder in (run, run / OUTPUTS[stage]):
            before = files(run)
            disk.refuses = lambda path, folder=folder: errno.EROFS if path.startswith(str(folder)) else 0
            code, said = in_small(*COMMANDS[stage], SYSTEM, out=run)
            disk.refuses = None
            assert code == 2, (stage, folder)
            assert said.startswith(str(folder)), said
            assert said.endswith(" cannot be written: Read-only file system"), said
            check_kept(before, files(run))
        code, said = in_small(*COMMANDS[stage], SYSTEM, out=run)
        assert code == 0, said
    assert files(run) == files(whole)
