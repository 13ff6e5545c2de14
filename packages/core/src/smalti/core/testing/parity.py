"""Parity cases: what an original system computes for weights and inputs that follow from seeds.

A case is one JSON file: the published checkpoint's layout (every state-dict key with its shape and dtype), the
model's configuration, and digests of what the original computed. No weights are stored, they follow from
(seed, key, shape):

    case = read_case(path)
    weights = fill_state_dict(case["state_dict"], case["weight_seed"])
    inputs = fill_case_inputs(case)
    problems = compare(case["outputs"]["latent"], latent)  # [] where it matches
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def fill_tensor(key: str, shape: list[int], dtype: str, seed: int) -> torch.Tensor:
    """The value of state-dict entry `key` under `seed`.

    Integer and bool entries are zeros. Floating entries, in this order of rules: a running variance
    lies in [1, 2); an entry of two or more axes is normal with standard deviation
    1/sqrt(elements per output row); a one-axis `weight`, `gamma`, `scale` is 1 + 0.1 normal; anything
    else is 0.1 normal.
    """
    kind = getattr(torch, dtype)
    if not kind.is_floating_point:
        return torch.zeros(shape, dtype=kind)
    random = _generator(seed, key)
    last = key.rsplit(".", 1)[-1]
    if last == "running_var":
        values = 1.0 + random.random(shape)
    elif len(shape) >= 2:
        fan_in = max(1, int(np.prod(shape[1:])))
        values = random.standard_normal(shape) / np.sqrt(fan_in)
    elif len(shape) == 1 and last in ("weight", "gamma", "scale"):
        values = 1.0 + 0.1 * random.standard_normal(shape)
    else:
        values = 0.1 * random.standard_normal(shape)
    return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(kind)


def fill_state_dict(layout: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """A whole state dict. `layout` maps a key to {"shape": [...], "dtype": "float32"}.

    An entry that also has "constant" (a nested list) takes that value. An entry marked "computed" is a
    buffer that the original builds itself (masks, frequency tables): published files may hold it, it is
    left out here, and a loader must accept it either way. An entry marked "unused" is filled like any
    other; a re-implementation may ignore it. "fill_as" and "fill_seed" replace the key and the seed that
    the rule uses (an averaged copy that equals, or differs from, the plain weights).
    """
    out = {}
    for key, entry in layout.items():
        if entry.get("computed"):
            continue
        if "constant" in entry:
            out[key] = torch.tensor(entry["constant"], dtype=getattr(torch, entry["dtype"])).reshape(entry["shape"])
        else:
            name, its_seed = entry.get("fill_as", key), entry.get("fill_seed", seed)
            out[key] = fill_tensor(name, entry["shape"], entry["dtype"], its_seed)
    return out


def fill_input(name: str, shape: list[int], seed: int, kind: str = "image", high: int | None = None) -> torch.Tensor:
    """An input: kind "image" is smooth, in [-1, 1]; "normal" is standard normal; "tokens" is int64 in [0, high)."""
    random = _generator(seed, "input:" + name)
    if kind == "tokens":
        return torch.from_numpy(random.integers(0, high, size=shape))
    values = random.standard_normal(shape)
    if kind == "normal":
        return torch.from_numpy(values).float()
    if kind != "image":
        raise ValueError(f"unknown input kind {kind!r}")
    # a few random plane waves per channel, so that neighbouring pixels agree as they do in photographs
    batch, channels, height, width = shape
    yy, xx = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    out = np.zeros(shape)
    for b in range(batch):
        for c in range(channels):
            for _ in range(6):
                fy, fx = random.uniform(-6, 6, 2)
                out[b, c] += random.standard_normal() * np.cos(
                    2 * np.pi * (fy * yy + fx * xx) + random.uniform(0, 6.28)
                )
    out += 0.05 * values
    return torch.from_numpy(np.tanh(0.5 * out)).float()


def fill_case_inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All inputs of a case by name; one that has "scale" is multiplied by it, "values" are as given."""
    out = {}
    for name, entry in case["inputs"].items():
        if entry.get("kind") == "values":
            out[name] = torch.tensor(entry["values"]).reshape(entry["shape"])
            continue
        value = fill_input(name, entry["shape"], entry["seed"], entry.get("kind", "image"), entry.get("high"))
        out[name] = value * entry["scale"] if "scale" in entry else value
    return out


def compare(
    expected: dict[str, Any], actual: torch.Tensor, rtol: float = 1e-3, tokens_equal: float = 0.995
) -> list[str]:
    """What differs, in words; empty where the output matches.

    Floats: |actual - expected| <= rtol * expected std, at every stored element. Integers: at least
    `tokens_equal` of them equal (a tie of two codes may fall either way).
    """
    if list(actual.shape) != expected["shape"]:
        return [f"shape {list(actual.shape)}, expected {expected['shape']}"]
    flat = actual.detach().cpu().reshape(-1)
    if "mean" not in expected:
        same = (flat.long() == torch.tensor(expected["values"])).double().mean().item()
        return [] if same >= tokens_equal else [f"{same:.2%} of the integers equal, expected {tokens_equal:.1%}"]
    flat = flat.double()
    if not torch.isfinite(flat).all():
        return ["not finite"]
    index = torch.tensor(expected.get("index", list(range(flat.numel()))), dtype=torch.long)
    error = (flat[index] - torch.tensor(expected["values"], dtype=torch.float64)).abs().max().item()
    # one element has no spread: its own size is the scale
    scale = max(expected["std"] if flat.numel() > 1 else expected["absmax"], 1e-6)
    return (
        []
        if error <= rtol * scale
        else [f"largest error {error:.3g} is {error / scale:.3g} of the expected std {scale:.3g}"]
    )


def read_case(path: str | Path) -> dict[str, Any]:
    """A case file, compressed (`.json.gz`) or not."""
    content = Path(path).read_bytes()
    case: dict[str, Any] = json.loads(gzip.decompress(content) if str(path).endswith(".gz") else content)
    return case


Runner = Callable[[dict[str, Any], ModuleType], Mapping[str, torch.Tensor]]
"""Runs a case on a model of ours, with the functions of this module, and gives the outputs by stage."""


def parametrize_cases(
    metafunc: pytest.Metafunc,
    folder: Path,
    families: tuple[str, ...],
    elsewhere: tuple[str, ...] = (),
    slow: tuple[str, ...] = (),
) -> None:
    """Give the test that takes a `path` every case file of some families, for a module's `pytest_generate_tests`.

    A file in the folder that the option `--parity-cases` names goes before one of its name in `folder`.

    Args:
        metafunc: of the hook.
        folder: with `NAME.json.gz`.
        families: beginnings of the names that are wanted.
        elsewhere: beginnings of names among them that others answer for.
        slow: beginnings of names of cases that take more than seconds.
    """
    if "path" not in metafunc.fixturenames:
        return
    further = metafunc.config.getoption("--parity-cases", default=None)
    paths = [*folder.glob("*.json.gz"), *(Path(further).glob("*.json*") if further else ())]
    found = {path.name.split(".json")[0]: path for path in paths}
    wanted = (name for name in sorted(found) if name.startswith(families) and not name.startswith(elsewhere))
    metafunc.parametrize(
        "path",
        [
            pytest.param(found[name], id=name, marks=pytest.mark.slow if name.startswith(slow) else ())
            for name in wanted
        ],
    )


def load_runners(folder: Path, pattern: str) -> dict[str, Runner]:
    """The runners in the modules of a folder: every `RUNNERS`, by the beginning of the names they run."""
    sys.path.insert(0, str(folder))
    try:
        modules = [importlib.import_module(path.stem) for path in sorted(folder.glob(pattern))]
    finally:
        sys.path.remove(str(folder))
    return {prefix: run for module in modules for prefix, run in getattr(module, "RUNNERS", {}).items()}


def check_case(path: Path, runners: Mapping[str, Runner]) -> None:
    """Run a case by the runner with the longest prefix of its name; every stage must match.

    Raises:
        AssertionError: no runner, a stage that the runner does not give, or stages that differ, with how much.
    """
    case = read_case(path)
    matching = [prefix for prefix in runners if case["name"].startswith(prefix)]
    assert matching, f"no runner knows the case {case['name']} ({path})"
    found = runners[max(matching, key=len)](case, sys.modules[__name__])
    missing = case["outputs"].keys() - found.keys()
    assert not missing, f"the runner gives no {', '.join(sorted(missing))}"
    problems = {
        stage: problem for stage, digest in case["outputs"].items() if (problem := compare(digest, found[stage]))
    }
    assert not problems, problems
