"""From logits to tokens: guidance, temperature, top-k, top-p, and one draw by inverse CDF.

No function changes its input. What is filtered out becomes -inf.

Legend: B batch, N positions drawn at once, S streams, K codes.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.noise import uniform, uniform_steps
from smalti.core.sampling_settings import SamplingSettings


class TokenSampler:
    """Draws all tokens of one call of `Generator.sample`, each with noise of its own.

    Args:
        settings: of the call.
        indices: `(B,)`, the numbers of the samples within the run.
        steps: draws per stream from the first to the last; they say where in its schedule the guidance is.
        streams: S; settings may differ from stream to stream.

    Attributes:
        guides: whether the batch has to hold every sample twice, the conditional ones first, then those of the null
            class.
    """

    def __init__(self, settings: SamplingSettings, indices: Tensor, steps: int, streams: int = 1) -> None:
        self.guides = settings.guides
        self._settings = settings.per_stream(streams)
        self._indices = indices
        self._steps = steps

    @classmethod
    def start(
        cls,
        settings: SamplingSettings,
        labels: Tensor,
        indices: Tensor | None,
        steps: int,
        streams: int,
        label_dropout: float,
    ) -> TokenSampler:
        """The sampler for one call of `Generator.sample` with these arguments.

        Args:
            settings: of the call.
            labels: `(B, ...)`.
            indices: `(B,)`, by default 0, 1, ...
            steps: draws per stream.
            streams: S.
            label_dropout: with which the generator was trained.

        Raises:
            UserError: guidance for a generator that was trained without label dropout; lists of another length than S;
                settings of generators that draw many tokens at once.
        """
        check_guidance(settings, label_dropout)
        for name in ("steps", "annealing"):
            if getattr(settings, name):
                raise UserError(f"{name} is of generators that draw many tokens at once, as maskgit; leave it out")
        if indices is None:
            indices = torch.arange(len(labels), device=labels.device)
        return cls(settings, indices, steps, streams)

    def draw(self, logits: Tensor, step: int, stream: int = 0, progress: float | None = None) -> Tensor:
        """Draw the tokens of one step.

        Args:
            logits: `(B, K)` or `(B, N, K)`; with guidance 2B rows.
            step: 0 to steps - 1.
            stream: 0 to S - 1.
            progress: of the guidance schedule, 0 to 1; by default step / steps.

        Returns:
            `(B,)` or `(B, N)` int64.
        """
        settings, number = self._settings[stream], step * len(self._settings) + stream
        logits = self.guided(logits, step, stream, progress)
        if logits.dim() == 2 and settings.temperature != 0:
            return _drawn(logits, settings, self._one_by_one[:, number])
        return next_tokens(logits, settings, self._indices, number)

    @cached_property
    def _one_by_one(self) -> Tensor:
        """The noise of all draws `(B, steps * S, 1)` where each is of one token: in one go, not in a thousand."""
        return uniform_steps(self._settings[0].seed, self._indices, range(self._steps * len(self._settings)))

    def guided(self, logits: Tensor, step: int, stream: int = 0, progress: float | None = None) -> Tensor:
        """The guided logits `(B, ...)` of a step, out of those of both halves where guidance is on."""
        if not self.guides:
            return logits
        weight = self._settings[stream].guidance_weight(step, step / self._steps if progress is None else progress)
        return logits.chunk(2)[0] if weight == 1 else guided(logits, weight)

    def filtered(self, logits: Tensor, step: int, stream: int = 0, progress: float | None = None) -> Tensor:
        """The logits that `draw` draws from, `(B, ...)`: guided, divided by the temperature, filtered."""
        rows = self.guided(logits, step, stream, progress)
        return filtered(rows.flatten(0, -2), self._settings[stream]).view(rows.shape)

    def uniform(self, step: int, lanes: int) -> Tensor:
        """Noise `(B, lanes)` float64 in [0, 1) for something beside draws, which have the steps below steps * S."""
        return uniform(self._settings[0].seed, self._indices, step, lanes)

    def twice(self, tokens: Tensor) -> Tensor:
        """`(B, ...)` for both halves of the batch, `(2B, ...)`; as it is without guidance."""
        return torch.cat([tokens, tokens]) if self.guides else tokens

    def null_rows(self) -> Tensor | None:
        """`(2B,)`, true for the half of the null class; None without guidance."""
        if not self.guides:
            return None
        batch = len(self._indices)
        return torch.arange(2 * batch, device=self._indices.device) >= batch


def check_guidance(settings: SamplingSettings, label_dropout: float) -> None:
    """Raise a `UserError` for guidance of a generator that was trained without label dropout."""
    if settings.guides and label_dropout == 0:
        raise UserError("guidance needs a generator trained with label_dropout above 0; take guidance_scale=1")


def next_tokens(logits: Tensor, settings: SamplingSettings, indices: Tensor, step: int) -> Tensor:
    """Draw one token per sample and position.

    Args:
        logits: `(B, K)` or `(B, N, K)`, guided.
        settings: of one stream; temperature, top-k, top-p and seed; guidance is not applied here.
        indices: `(B,)`, the numbers of the samples within the run.
        step: of decoding; with seed, index and position it determines the noise.

    Returns:
        `(B,)` or `(B, N)` int64.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    return _drawn(logits, settings, uniform(settings.seed, indices, step, lanes=math.prod(logits.shape[1:-1])))


def _drawn(logits: Tensor, settings: SamplingSettings, noise: Tensor) -> Tensor:
    return inverse_cdf(filtered(logits.flatten(0, -2), settings), noise.reshape(-1, 1)).view(logits.shape[:-1])


def filtered(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Logits `(B, K)` divided by the temperature, then through top-k and top-p, by the settings of one stream."""
    temperature, k, p = settings.temperature, settings.top_k, settings.top_p
    assert not isinstance(temperature, tuple), "the settings of one stream are needed"
    assert not isinstance(k, tuple)
    assert not isinstance(p, tuple)
    if temperature == 0:
        return top_k(logits, 1)
    rows = logits if temperature == 1 else at_temperature(logits, temperature)
    if k:
        rows = top_k(rows, k)
    return top_p(rows, p, among=k) if p < 1 else rows


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) in LlamaGen's form: null + scale (conditional - null).

    Args:
        logits: `(2B, ...)`, first all conditional ones, then those of the null class.
        scale: 1 gives the conditional ones.

    Returns:
        `(B, ...)`.
    """
    conditional, null = logits.chunk(2)
    return null + (conditional - null) * scale


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits `(B, K)` divided by a positive temperature.

    The largest logit of each row is moved to 0 first: no probability changes, and no temperature overflows.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row of `(B, K)`, and all that equal the k-th."""
    if k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def top_p(logits: Tensor, p: float, among: int = 0) -> Tensor:
    """Nucleus filter (Holtzman et al. 2020): keep a code if those more likely than it sum to at most p.

    So the first code beyond p is kept, the most likely one always, and codes of equal logits share their fate.

    Args:
        logits: `(B, K)`.
        p: between 0 and 1.
        among: where a top-k filter came before, its k: only so many are sorted. 0 for all.

    Returns:
        `(B, K)`.
    """
    size = logits.shape[-1]
    largest = logits.topk(min(among, size) or size).values
    # The total runs over all codes, since ties may have survived beyond the k-th.
    log_probabilities = largest - logits.logsumexp(-1, keepdim=True)
    probabilities = log_probabilities.exp().double()
    more_likely = probabilities.cumsum(-1) - probabilities
    kept = (more_likely <= p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < largest.gather(-1, kept - 1), -torch.inf)


def inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """The first code whose cumulative probability, summed in float64, exceeds the uniform number of its row.

    Args:
        logits: `(B, K)`.
        uniform: `(B, 1)` float64 in [0, 1).

    Returns:
        `(B,)` int64; never a code of probability 0.
    """
    # First the run of codes, then the code within it: a cumulative sum over all of them is slow, as each step waits for
    # the one before.
    run = math.isqrt(logits.shape[-1])
    runs = F.pad(logits.softmax(-1), (0, -logits.shape[-1] % run)).unflatten(-1, (-1, run))
    ends = runs.sum(-1, dtype=torch.float64).cumsum(-1)
    chosen, target = _first_beyond(ends, uniform * ends[:, -1:])
    rest = target - F.pad(ends, (1, 0)).gather(-1, chosen)
    within = runs.gather(1, chosen[:, :, None].expand(-1, -1, run)).squeeze(1)
    code, _ = _first_beyond(within.cumsum(-1, dtype=torch.float64), rest)
    return (chosen * run + code).squeeze(-1)


def _first_beyond(cumulative: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first place of each row `(B, K)` that exceeds the target `(B, 1)`, and the target, moved below the last."""
    # A product, or a sum in another order, may have rounded up to the total, beyond all that has any probability.
    target = torch.minimum(target, cumulative[:, -1:].nextafter(torch.zeros_like(target)))
    return torch.searchsorted(cumulative, target, right=True), target
