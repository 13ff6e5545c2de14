"""Weights and inputs of parity cases from their seeds, and the comparison with what the originals computed."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def load_case(name: str) -> dict[str, Any]:
    content = gzip.decompress((Path(__file__).parent / f"{name}.json.gz").read_bytes())
    case: dict[str, Any] = json.loads(content)
    return case


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def weight(case: dict[str, Any], key: str) -> torch.Tensor:
    """A state-dict entry of two axes: normal, with standard deviation 1/sqrt(elements per row)."""
    shape = case["state_dict"][key]["shape"]
    values = _generator(case["weight_seed"], key).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values).float()


def inputs(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All inputs of a case by name: as given, tokens below `high`, or standard normal."""
    return {name: _input(name, entry) for name, entry in case["inputs"].items()}


def _input(name: str, entry: dict[str, Any]) -> torch.Tensor:
    if entry["kind"] == "values":
        return torch.tensor(entry["values"]).reshape(entry["shape"])
    random = _generator(entry["seed"], "input:" + name)
    if entry["kind"] == "tokens":
        return torch.from_numpy(random.integers(0, entry["high"], size=entry["shape"]))
    assert entry["kind"] == "normal"
    return torch.from_numpy(random.standard_normal(entry["shape"])).float()


def compare(expected: dict[str, Any], actual: torch.Tensor, rtol: float = 1e-3) -> list[str]:
    """What differs, in words; empty where the output matches.

    Floats: off by at most `rtol` times the standard deviation of the original's output, at every stored element.
    Integers: at least 99.5 % equal, since a tie of two codes may fall either way.
    """
    if list(actual.shape) != expected["shape"]:
        return [f"shape {list(actual.shape)}, expected {expected['shape']}"]
    flat = actual.detach().reshape(-1)
    if "mean" not in expected:
        same = (flat == torch.tensor(expected["values"])).double().mean().item()
        return [] if same >= 0.995 else [f"{same:.2%} of the integers equal"]
    index = torch.tensor(expected.get("index", list(range(flat.numel()))), dtype=torch.long)
    error = (flat.double()[index] - torch.tensor(expected["values"], dtype=torch.float64)).abs().max().item()
    scale = max(expected["std"], 1e-6)
    return [] if error <= rtol * scale else [f"largest error {error:.3g} is {error / scale:.3g} of the std {scale:.3g}"]
