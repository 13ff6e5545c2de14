import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from smalti.eval.charts import curves, usage_curves
from smalti.eval.figures import Figure
from smalti.eval.report import ClassRow, Report, render


@pytest.fixture
def report(figure_names):
    random = np.random.default_rng(0)

    def image():
        return random.integers(0, 256, (8, 8, 3)).astype(np.uint8)

    figures = {
        name: Figure(name=name, title=name.title(), value=0.5 + index, definition=f"how {name}", measured="<images>")
        for index, name in enumerate(figure_names)
    }
    return Report(
        recipe="toy & co",
        summary="a <b>summary</b>",
        note="not FID",
        figures=figures,
        seconds=432.4,
        curves={
            "train-tokenizer": [
                {"stage": "train-tokenizer", "step": 10, "learning_rate": 0.1, "l2": 1.0, "commitment": 0.2},
                {"stage": "train-tokenizer", "step": 20, "learning_rate": 0.1, "l2": 0.01, "commitment": 0.1},
            ],
            "classifier": [{"stage": "classifier", "step": 5, "learning_rate": 0.1, "cross_entropy": -0.5}],
        },
        pairs=[(image(), image()) for _ in range(3)],
        code_counts=[np.array([5, 0, 2, 1]), np.array([0, 0])],
        rows=[ClassRow("cats", 4, 0.75, 2, 1.0), ClassRow("<dogs>", 0, None, 0, None)],
        samples=[[image(), image()], []],
        protocol={"libraries": {"torch": "2"}, "text": "<&>"},
        resolved_recipe="name: <toy>\n",
    )


class Outline(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_is_whole_escaped_and_needs_nothing_else(report):
    page = render(report)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in outline.links)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)
    text = "".join(outline.text)
    for expected in ("toy & co", "a <b>summary</b>", "not FID", "<dogs>", "no samples", "75 %", "7 min 12 s", "<&>"):
        assert expected in text
    for name in report.figures:
        assert f"how {name}" in text


def test_its_pictures_are_the_given_ones(report):
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", render(report))
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(picture)))) for picture in pictures]
    expected = [*report.samples[0], *(image for pair in report.pairs for image in pair)]
    assert len(found) == len(expected)
    for picture, image in zip(found, expected, strict=True):
        np.testing.assert_array_equal(picture, image)


def test_its_charts_name_every_loss_and_take_their_colours_from_the_page(report):
    page = render(report)
    charts = [chart for chart in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL) if "<text" in chart]
    assert len(charts) == 3
    for label in ("l2", "commitment", "cross entropy", "stream 2", "even use"):
        assert any(f">{label}<" in chart for chart in charts)
    assert not any(re.search(r"#0[0-9a]0[0-9a-f]0[0-9]", chart) for chart in charts)
    assert all("var(--series-1)" in chart for chart in charts)


def _health(step, usage, **more):
    found = {"usage": usage, "perplexity": [5.0] * len(usage), "dead_codes": [1.0] * len(usage), **more}
    return {"stage": "train-tokenizer", "step": step, "learning_rate": 0.1, "l2": 1.0, "codebook_health": found}


def test_usage_over_training_has_a_chart_of_its_own(report):
    assert usage_curves(report.curves["classifier"]) is None
    lines = [_health(10, [0.9, 0.8]), _health(20, [0.95, 0.3], collapsed=[1])]
    chart = usage_curves(lines)
    for label in ("stream 1", "stream 2", "collapse", "codes in use (%)"):
        assert f">{label}<" in chart
    assert ">stream 3<" not in chart
    assert ">collapse<" not in usage_curves(lines[:1])
    assert "codebook" not in curves(lines)
    validated = [*lines[:-1], {**lines[-1], "validation": {"ema": {"psnr": 20.0}}}]
    assert curves(validated) == curves(lines)
    one = usage_curves([_health(10, [0.9])])
    assert ">usage<" in one
    page = render(replace(report, curves={"train-tokenizer": lines}))
    assert "Tokenizer: codes in use" in page
    assert chart in page


def test_usage_of_scales_is_drawn_by_scale():
    lines = [_health(step, [0.5], usage_of_scales=[[0.1], [0.9]]) for step in (1, 2)]
    assert ">scale 2<" in usage_curves(lines)
    assert ">scale 3<" not in usage_curves(lines)


def test_the_same_report_is_the_same_text(report):
    assert render(report) == render(report)
    assert render(replace(report, seconds=1.0)) != render(report)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (24.314, "dB", "24.3 dB"),
        (0.9651, "share", "96.5 %"),
        (143.21, "codes", "143.2 codes"),
        (1.734, "", "1.73"),
        (0.2134, "", "0.213"),
        (-0.0017912, "", "-0.00179"),
    ],
)
def test_values_are_written_for_people(value, unit, text):
    assert Figure(name="x", title="X", value=value, unit=unit, definition="", measured="").text() == text


def test_findings_of_validations_have_no_curve():
    lines = [{"stage": "s", "step": step, "learning_rate": 0.1, "loss": 1 / step, "validation": {"psnr": 3.0}}
             for step in (1, 2, 3)]  # fmt: skip
    assert "loss" in curves(lines)
    assert "validation" not in curves(lines)
