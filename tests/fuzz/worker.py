"""Gives readers mutated files, in processes of their own, and tells what else came than a result or one sentence.

python worker.py --inputs 10000 --seed 0 --out findings.json READER...

Every input is drawn from (seed, reader, number): `--first N --inputs 1 --keep` makes one again and leaves its files.
A reader may not compute longer than `SECONDS`, take more than `ROOM` bytes, start a process, connect, write, or
import a module that lies about. A process that ends in any other way is a finding, and another one goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from mutation import mutated
from readers import READERS, Reader

from smalti.core.errors import UserError

SECONDS = 10.0  # of the processor
WAITING = 600.0  # seconds of the clock, on machines that are shared
ROOM = 2 << 30  # of address space
GROWTH = 700 << 20  # of memory in use: a picture as large as Pillow takes, with copies of it in other types
LONGEST = 1500  # letters of a sentence
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect",
             "os.symlink", "os.link", "ctypes.dlopen")  # fmt: skip
CHANGING = ("os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree")
OWN = ("scratch/", "files/state/", "files/metrics.jsonl/", "files/.metrics.jsonl.part/")
MARKS = ("executed", "../executed", "files/executed", "/tmp/smalti-fuzz-executed")
STATUS = Path("/proc/self/status")
LATER = 2 * 10**18  # nanoseconds: the time of the file that an input is about
UNBORN = 2**64 - 1  # number of an input before the first
TRAP = "toy_side_effect"


class Watch:
    """What a reader does that it may not do."""

    def __init__(self, sandbox: Path) -> None:
        self.sandbox = sandbox
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.200}")
        writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writing or event in CHANGING) and not self._own(arguments[0]):
            self.seen.append(f"{event} {arguments[0]!r:.200}")

    def _own(self, path: Any) -> bool:
        """Whether it is a file that the reader's caller writes."""
        told = os.path.abspath(path) if isinstance(path, str) else ""  # noqa: PTH100
        return f"{told}/".startswith(tuple(f"{self.sandbox}/{own}" for own in OWN))


def memory(field: str) -> int:
    """Bytes that a line of /proc/self/status tells."""
    status = STATUS.read_bytes()
    return int(status[status.index(field.encode() + b":") :].split(maxsplit=2)[1]) << 10


def drawn(name: str, number: int, seed: int, whole: dict[str, bytes]) -> tuple[str, bytes]:
    """An input: the file that is changed, and what it holds."""
    random = Random(f"{seed} {name} {number}")
    chosen = random.choice(sorted(whole))
    others = [content for other, content in whole.items() if other != chosen]
    return chosen, mutated(chosen, whole[chosen], random, others)


def problem(reader: Reader, folder: Path, changed: str, watch: Watch) -> tuple[str, str] | None:
    """What is wrong with what a reader does; a short name of it, and all about it."""
    watch.seen.clear()
    told = ""
    os.chdir(watch.sandbox)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        watch.on = True
        try:
            reader.read(folder)
        except UserError as error:
            told = str(error)
        except Exception as error:  # noqa: BLE001
            frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "smalti" in frame.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
            return f"{type(error).__name__} in {place}", "".join(traceback.format_exception(error))[-3000:]
        finally:
            watch.on = False
    if watch.seen or any(map(os.path.exists, MARKS)) or TRAP in sys.modules:
        return "something was done", "; ".join(watch.seen) or "a mark was left"
    for warning in heard:
        if "PIL" in warning.filename:  # of what is odd about a picture; decoding tells what counts
            continue
        return f"warning {warning.category.__name__}", f"{warning.filename}:{warning.lineno}: {warning.message}"
    if told and ("\n" in told or not told.isprintable()):
        return "not one printable line", repr(told)
    if len(told) > LONGEST:
        return "too long a sentence", told[:3000]
    # An image is named by its key where the shard is a stream; a shard by its name in the folder `.`.
    if told and not any(name in told for name in (str(folder), Path(changed).name, "image ", "shard ")):
        return "no file is named", told
    return None


def work(name: str, numbers: range, seed: int, sandbox: Path, at: mmap.mmap, *, keep: bool) -> dict[str, Any]:
    """Some inputs, one after the other, in this process."""
    reader = READERS[name]
    folder = sandbox / "files"
    folder.mkdir()
    (sandbox / "scratch").mkdir()
    tempfile.tempdir = str(sandbox / "scratch")  # torch opens one for what looks like its oldest files
    (sandbox / f"{TRAP}.py").write_text("class Innocent:\n    pass\n")
    sys.path.insert(0, str(sandbox))
    os.chdir(sandbox)
    reader.seed(folder)
    whole = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    reader.read(folder)
    limit = memory("VmSize") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = Watch(sandbox)
    findings: dict[str, dict[str, Any]] = {}
    slowest, largest = 0.0, memory("VmHWM")
    for number in numbers:
        at[:8] = number.to_bytes(8, "little")
        changed, content = drawn(name, number, seed, whole)
        (folder / changed).write_bytes(content)
        os.utime(folder / changed, ns=(LATER, LATER))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        began = time.process_time()
        found = problem(reader, folder, changed, watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        slowest = max(slowest, time.process_time() - began)
        most = memory("VmHWM")
        if found is None and most - largest > GROWTH:
            found = "too much memory", f"{(most - largest) >> 20} MiB"
        largest = max(most, largest)
        if found is not None:
            entry = findings.setdefault(found[0], {"count": 0, "first": number, "file": changed, "told": found[1]})
            entry["count"] += 1
        if keep:
            break
        (folder / changed).write_bytes(whole[changed])
        for mark in (sandbox / "executed", sandbox.parent / "executed"):
            mark.unlink(missing_ok=True)
    return {"inputs": len(numbers), "findings": findings, "slowest": round(slowest, 2), "peak_mib": largest >> 20}


def fuzzed(name: str, first: int, inputs: int, seed: int, *, keep: bool) -> dict[str, Any]:
    """All inputs of one reader; a process that dies is a finding, and another goes on with the next input."""
    total: dict[str, Any] = {"inputs": 0, "findings": {}, "slowest": 0.0, "peak_mib": 0}
    at = mmap.mmap(-1, 8)
    start, deaths = first, 0
    while start < first + inputs and deaths < 50:
        outer = Path(tempfile.mkdtemp(prefix="smalti-fuzz-"))
        result = outer / "result.json"
        (outer / "sandbox").mkdir()
        at[:8] = UNBORN.to_bytes(8, "little")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                if not keep:
                    os.dup2(os.open(outer / "stderr", os.O_WRONLY | os.O_CREAT), 2)
                done = work(name, range(start, first + inputs), seed, outer / "sandbox", at, keep=keep)
                result.write_text(json.dumps(done))
                code = 0
            except BaseException:  # noqa: BLE001  # to be told by the parent
                os.write(2, traceback.format_exc().encode())
            os._exit(code)
        _, status = os.waitpid(child, 0)
        number = int.from_bytes(at[:8], "little")
        if status == 0:
            done = json.loads(result.read_text())
            reached = first + inputs
        else:
            deaths += 1
            death = (
                f"signal {signal.Signals(os.WTERMSIG(status)).name}"
                if os.WIFSIGNALED(status)
                else f"exit {status >> 8}"
            )
            told = (outer / "stderr").read_text()[-2000:] if (outer / "stderr").exists() else ""
            entry = {"count": 1, "first": number, "file": "", "told": told}
            done = {"findings": {f"the process ended by {death}": entry}, "slowest": 0.0, "peak_mib": 0}
            reached = number + 1
            if number == UNBORN:
                print(f"{name} did not begin: {told}")
                break
        total["inputs"] += reached - start
        start = reached
        total["slowest"], total["peak_mib"] = (max(total[key], done[key]) for key in ("slowest", "peak_mib"))
        for kind, entry in done["findings"].items():
            total["findings"].setdefault(kind, {**entry, "count": 0})["count"] += entry["count"]
        if keep:
            print(outer)
            break
        shutil.rmtree(outer)
    return total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--inputs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("readers", nargs="*", default=list(READERS))
    asked = parser.parse_args()
    results = {}
    for name in asked.readers:
        began = time.process_time(), os.times().children_user + os.times().children_system
        results[name] = fuzzed(name, asked.first, asked.inputs, asked.seed, keep=asked.keep)
        used = os.times().children_user + os.times().children_system - began[1]
        told = {kind: (entry["count"], entry["first"]) for kind, entry in results[name]["findings"].items()}
        print(f"{name}: {results[name]['inputs']} inputs, {used:.1f} s, slowest {results[name]['slowest']} s, "
              f"peak {results[name]['peak_mib']} MiB, {told}", flush=True)  # fmt: skip
    if asked.out is not None:
        asked.out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
