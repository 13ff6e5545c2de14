import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.eval import distances as module
from smalti.eval.precision_recall import precision_recall


def naive(samples, references, neighbours):
    """Every pair by itself, float64."""

    def radii(vectors):
        found = []
        for index, vector in enumerate(vectors):
            others = [np.sum((vector - other) ** 2) for place, other in enumerate(vectors) if place != index]
            found.append(sorted(others)[neighbours - 1])
        return found

    def share(vectors, manifold):
        sizes = radii(manifold)
        inside = [
            any(np.sum((vector - centre) ** 2) <= size for centre, size in zip(manifold, sizes, strict=True))
            for vector in vectors
        ]
        return np.mean(inside)

    return share(samples, references), share(references, samples)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(4, 30),
    st.integers(4, 30),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.sampled_from([0.0, 300.0]),
)
def test_shares_are_those_of_every_pair(count, others, width, neighbours, rows, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(count, width, generator=generator, dtype=torch.float64) + offset
    references = 0.8 * torch.randn(others, width, generator=generator, dtype=torch.float64) + offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", rows)
        found = precision_recall(samples, references, neighbours)
    assert found == pytest.approx(naive(samples.numpy(), references.numpy(), neighbours))


def test_a_vector_on_the_border_is_inside():
    """On a line of integers the third neighbour of the end is 3 away: a sample at -3 touches its ball."""
    line = torch.arange(8.0)[:, None]
    touching = torch.tensor([[-3.0], [-3.5], [10.0], [11.0]])
    assert precision_recall(touching, line, 3).precision == 0.5


def test_extremes():
    vectors = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    assert precision_recall(vectors, vectors) == (1.0, 1.0)
    assert precision_recall(vectors, vectors + 100) == (0.0, 0.0)
    collapsed = vectors[:1].expand(50, -1)
    assert precision_recall(collapsed, vectors).precision == 1.0
    assert precision_recall(collapsed, vectors).recall <= 0.02


@pytest.mark.parametrize(
    ("samples", "references", "sentence"),
    [
        (
            torch.zeros(5, 2),
            torch.zeros(5, 3),
            "samples and references must be (N, D) and (M, D), got (5, 2) and (5, 3)",
        ),
        (torch.zeros(5, 2), torch.zeros(3, 2), "3 neighbours need more vectors than that, got 3 references"),
        (torch.full((5, 2), torch.inf), torch.zeros(5, 2), "features must be finite, but those of the samples are not"),
    ],
)
def test_wrong_features_are_refused(samples, references, sentence):
    with pytest.raises(UserError) as error:
        precision_recall(samples, references)
    assert str(error.value) == sentence


def adm_twin(samples, references, neighbours):
    """Whole matrices, every step rounded to float16; the vector itself counts among its neighbours."""

    def distances(a, b):
        a, b = a.astype(np.float16), b.astype(np.float16)
        lengths = [(rows * rows).astype(np.float32).sum(1).astype(np.float16) for rows in (a, b)]
        products = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
        return np.maximum((lengths[0][:, None] - np.float16(2) * products) + lengths[1], np.float16(0))

    own, others = (np.sort(distances(rows, rows), axis=1)[:, neighbours] for rows in (samples, references))
    between = distances(samples, references)
    return (between <= others).any(1).mean(), (between <= own[:, None]).any(0).mean()


def test_adms_rounding():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(300, 40, generator=generator)
    references = 0.9 * torch.rand(250, 40, generator=generator)
    found = precision_recall(samples, references, 3, "float16")
    assert found == pytest.approx(adm_twin(samples.numpy(), references.numpy(), 3))
    assert found != precision_recall(samples, references, 3)


def test_what_does_not_fit_into_float16_is_float32():
    generator = torch.Generator().manual_seed(0)
    samples = 300 * torch.randn(60, 8, generator=generator)
    references = 300 * torch.randn(50, 8, generator=generator)
    assert precision_recall(samples, references, 3, "float16") == precision_recall(samples, references, 3)


def test_large_blocks_are_searched_in_groups():
    distances = torch.rand(7, 1024, generator=torch.Generator().manual_seed(0))
    distances[:, ::50] = 0.5
    assert torch.equal(module.smallest(distances, 4).sort(1).values, distances.sort(1).values[:, :4])
    turned = torch.rand(1024, 7, generator=torch.Generator().manual_seed(0)).T
    assert torch.equal(module.smallest(turned, 4).sort(1).values, turned.sort(1).values[:, :4])
