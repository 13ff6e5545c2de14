"""Metrics of sets of images as objects, for use in training: `FrechetDistance(statistics).update(x).compute()`."""

from __future__ import annotations

from typing import ClassVar

from smalti.core.contracts import Features
from smalti.core.errors import UserError
from smalti.eval import density_coverage, inception_score, kernel_distance, precision_recall
from smalti.eval.density_coverage import DensityCoverage
from smalti.eval.distances import Rounding
from smalti.eval.feature_rows import FeatureRows
from smalti.eval.frechet import FRECHET_DEFINITION, Gaussian, GaussianStatistics, frechet_distance
from smalti.eval.inception_score import Score
from smalti.eval.metric import Metric
from smalti.eval.precision_recall import PrecisionRecall


class FrechetDistance(Metric[GaussianStatistics, float]):
    """The Frechet distance in any features: FID with `pool`, sFID with `spatial` ones of the TF-compatible Inception.

    Args:
        reference: statistics to compare with; None gathers those of updates with `real=True`.
        extractor: makes features of images; None takes features.
        output: which features of the extractor.
    """

    definition = FRECHET_DEFINITION

    def __init__(
        self, reference: Gaussian | None = None, *, extractor: Features | None = None, output: str = "pool"
    ) -> None:
        super().__init__(GaussianStatistics(), extractor, output)
        self.reference = reference

    def compute(self) -> float:
        """The distance, 0 for equal statistics.

        Raises:
            UserError: fewer than two samples or references, or references beside given statistics.
        """
        if self.reference is None:
            return frechet_distance(self.samples, self.references)
        if self.references.n:
            raise UserError(f"a Frechet distance was given statistics to compare with and {self.references.n} images")
        return frechet_distance(self.samples, self.reference)


class InceptionScore(Metric[FeatureRows, Score]):
    """The Inception Score of samples, see `smalti.eval.inception_score.inception_score`; it takes logits."""

    looks_at_references: ClassVar[bool] = False

    def __init__(
        self,
        splits: int = 10,
        seed: int | None = 2020,
        *,
        extractor: Features | None = None,
        output: str = "logits",
    ) -> None:
        super().__init__(FeatureRows(), extractor, output)
        self.splits, self.seed = splits, seed
        self.definition = inception_score.definition(splits, seed)

    def compute(self) -> Score:
        """Mean and standard deviation over the parts."""
        return inception_score.inception_score(self.samples.rows, self.splits, self.seed)


class AdmInceptionScore(Metric[FeatureRows, Score]):
    """The Inception Score over consecutive samples, see `smalti.eval.inception_score.adm_inception_score`."""

    looks_at_references: ClassVar[bool] = False

    def __init__(self, split_size: int = 5000, *, extractor: Features | None = None, output: str = "logits") -> None:
        super().__init__(FeatureRows(), extractor, output)
        self.split_size = split_size
        self.definition = inception_score.adm_definition(split_size)

    def compute(self) -> Score:
        """Mean and standard deviation over the parts."""
        return inception_score.adm_inception_score(self.samples.rows, self.split_size)


class PrecisionAndRecall(Metric[FeatureRows, PrecisionRecall]):
    """Precision and recall, see `smalti.eval.precision_recall.precision_recall`."""

    def __init__(
        self,
        neighbours: int = 3,
        distances: Rounding = "float32",
        *,
        extractor: Features | None = None,
        output: str = "pool",
    ) -> None:
        super().__init__(FeatureRows(), extractor, output)
        self.neighbours, self.distances = neighbours, distances
        self.definition = precision_recall.definition(neighbours, distances)

    def compute(self) -> PrecisionRecall:
        """Both shares."""
        return precision_recall.precision_recall(
            self.samples.rows, self.references.rows, self.neighbours, self.distances
        )


class DensityAndCoverage(Metric[FeatureRows, DensityCoverage]):
    """Density and coverage, see `smalti.eval.density_coverage.density_coverage`."""

    def __init__(self, neighbours: int = 5, *, extractor: Features | None = None, output: str = "pool") -> None:
        super().__init__(FeatureRows(), extractor, output)
        self.neighbours = neighbours
        self.definition = density_coverage.definition(neighbours)

    def compute(self) -> DensityCoverage:
        """Both figures."""
        return density_coverage.density_coverage(self.samples.rows, self.references.rows, self.neighbours)


class KernelDistance(Metric[FeatureRows, float]):
    """The kernel Inception distance of all pairs, see `smalti.eval.kernel_distance.kernel_distance`."""

    definition = f"{kernel_distance.KERNEL_DEFINITION}; unbiased estimate from all pairs"

    def __init__(self, *, extractor: Features | None = None, output: str = "pool") -> None:
        super().__init__(FeatureRows(), extractor, output)

    def compute(self) -> float:
        """The distance."""
        return kernel_distance.kernel_distance(self.samples.rows, self.references.rows)


class KernelDistanceOfSubsets(Metric[FeatureRows, Score]):
    """The same over random subsets, see `smalti.eval.kernel_distance.kernel_distance_of_subsets`."""

    def __init__(
        self,
        subsets: int = 100,
        size: int = 1000,
        seed: int = 2020,
        *,
        extractor: Features | None = None,
        output: str = "pool",
    ) -> None:
        super().__init__(FeatureRows(), extractor, output)
        self.subsets, self.size, self.seed = subsets, size, seed
        self.definition = kernel_distance.definition_of_subsets(subsets, size, seed)

    def compute(self) -> Score:
        """Mean and standard deviation over the subsets."""
        return kernel_distance.kernel_distance_of_subsets(
            self.samples.rows, self.references.rows, self.subsets, self.size, self.seed
        )


class CMMD(Metric[FeatureRows, float]):
    """The distance in features of CLIP, see `smalti.eval.kernel_distance.cmmd`."""

    definition = kernel_distance.CMMD_DEFINITION

    def __init__(self, *, extractor: Features | None = None, output: str = "pool") -> None:
        super().__init__(FeatureRows(), extractor, output)

    def compute(self) -> float:
        """The distance, 0 for equal sets."""
        return kernel_distance.cmmd(self.samples.rows, self.references.rows)
