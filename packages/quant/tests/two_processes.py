"""Run as a program: what two processes make of different data, for test_two_processes.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smalti.core.codebook_health import CodebookHealth
from smalti.core.testing.processes import run_in_processes
from smalti.quant.entropy import bits_entropy
from smalti.quant.vector import VectorQuantizerOptions


def trained(rank: int, options: VectorQuantizerOptions) -> dict[str, Any]:
    """State after training by DDP, in bf16 autocast, on data of this rank's own."""
    torch.manual_seed(0)
    replica = DistributedDataParallel(nn.Sequential(nn.Linear(6, options.dim), options.build()))
    optimizer = torch.optim.Adam(replica.parameters(), lr=0.01)
    for step in range(6):
        torch.manual_seed(100 * step + rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quantized = replica(torch.randn(2 + rank, 10, 6))
        optimizer.zero_grad()
        (quantized.latent.square().mean() + sum(quantized.losses.values())).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in replica.module.state_dict().items()}


def ema_step(rank: int, options: VectorQuantizerOptions, latent: torch.Tensor) -> dict[str, Any]:
    """State after one step on this rank's half of a batch."""
    torch.manual_seed(0)
    quantizer = options.build().train()
    quantizer(latent.chunk(2)[rank])
    return dict(quantizer.state_dict())


def health(rank: int, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Health of this rank's half of the tokens."""
    found = CodebookHealth((50,))
    found.update(tokens.chunk(2)[rank])
    return found.result()


def entropy(rank: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch entropy as this rank sees it with its half of the logits, and its gradient to them."""
    half = logits.chunk(2)[rank].clone().requires_grad_()
    batch = bits_entropy(half).batch
    batch.backward()
    assert half.grad is not None
    return batch.detach(), half.grad


def everything(rank: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """All of it in one process group, since starting processes is what takes time."""
    common = {"dim": 4, "codebook_size": 24, "initialise": "data", "revive_after": 2}
    return {
        "loss": trained(rank, VectorQuantizerOptions(**common, cosine=True)),
        "ema": trained(rank, VectorQuantizerOptions(**common, update="ema")),
        "step": ema_step(rank, VectorQuantizerOptions(**inputs["options"]), inputs["latent"]),
        "health": health(rank, inputs["tokens"]),
        "entropy": entropy(rank, inputs["logits"]),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.save(run_in_processes(everything, torch.load(folder / "inputs.pt")), folder / "results.pt")
