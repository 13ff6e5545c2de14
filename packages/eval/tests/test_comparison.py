"""Results of strangers in front of the comparison: rows, or one sentence."""

import json
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.eval.comparison import Row, compared

RESULT = {
    "protocol": {"name": "toy", "neighbours": 3, "preprocessing": None},
    "extractor": {"name": "small", "fingerprint": "f"},
    "reference": {"source": "b", "kind": "images", "count": 40, "sha256": "0"},
    "images": {"source": "a", "count": 40},
    "figures": {"fid": {"title": "FID", "value": 1.5, "better": "lower", "unit": ""}},
}
ROW = Row("fid", "FID", 1.5, 1.5, "lower")
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture
def paths(tmp_path):
    """Two results, the first one whole."""
    for name in ("one", "two"):
        (tmp_path / name).write_text(json.dumps(RESULT))
    return tmp_path / "one", tmp_path / "two"


def changed(place, value):
    """The result with another value at a dotted place."""
    content = deepcopy(RESULT)
    *above, last = place.split(".")
    inner = content
    for key in above:
        inner = inner[key]
    inner[last] = value
    return json.dumps(content)


PLACES = ["figures", "protocol.new", *RESULT]
PLACES += [f"{key}.{name}" for key in RESULT for name in RESULT[key]]
PLACES += [f"figures.fid.{name}" for name in RESULT["figures"]["fid"]]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=ANYTHING, turned=st.booleans())
def test_whatever_stands_in_a_result(paths, place, value, turned):
    one, two = paths
    two.write_text(changed(place, value))
    sentence, rows = "", []
    try:
        rows = compared(two, one) if turned else compared(one, two)
    except UserError as error:
        sentence = str(error)
    assert not sentence or str(two) in sentence
    assert len(sentence) < 1500
    assert sentence.isprintable()
    for row in rows:
        assert row.title.isprintable()
        assert row.better in f"{row.title:20} {row.first:12.6g} {row.second - row.first:+12.4g} {row.better}"


def test_equal_results_and_results_of_other_versions(paths):
    assert compared(*paths) == [ROW]
    paths[1].write_text(changed("figures.fid.new", 3))
    assert compared(*paths) == [ROW]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "two is damaged, expected a result of `smalti evaluate images`: Expecting property name"),
        ("[" * 10**5, "two is damaged, expected a result of `smalti evaluate images`: it is nested too deeply"),
        ("[]", "two is no result of `smalti evaluate images`: Input should be a valid dictionary"),
        (changed("images", {}), "two is no result of `smalti evaluate images`: images.count: Field required"),
        (changed("figures.fid", None), "two is no result of `smalti evaluate images`: figures.fid: Input should be"),
        (changed("figures.fid.value", "1"), "figures.fid.value: Input should be a valid number, got '1'"),
        (changed("figures.fid.value", 10**400), "figures.fid.value: Input should be a valid number, got 1000000"),
        (changed("figures.fid.title", "\x1b[31m"), "figures.fid.title: expected printable text, got '\\x1b[31m'"),
        (changed("figures.fid.title", "\ud800"), "figures.fid.title: Input should be a valid string, unable"),
        (changed("protocol.neighbours", "x" * 1000), f"protocol.neighbours is 3 and '{'x' * 76}..."),
    ],
)
def test_damaged_results_are_told(paths, content, problem):
    paths[1].write_text(content)
    with pytest.raises(UserError) as error:
        compared(*paths)
    assert problem in str(error.value)


def test_many_differences_are_cut_short(paths):
    protocol = {f"{index:02d}" * 100: index for index in range(50)}
    paths[1].write_text(changed("protocol", protocol))
    with pytest.raises(UserError) as error:
        compared(*paths)
    assert str(error.value).endswith(" and 45 more")
    assert len(str(error.value)) < 1500
