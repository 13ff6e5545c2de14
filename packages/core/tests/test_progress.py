"""Progress where nobody watches: a line now and then, and one at the end."""

import pytest

from smalti.core import progress
from smalti.core.progress import LINE_SECONDS, Reporter


@pytest.fixture
def told(monkeypatch, capsys):
    """Do steps of work that take seconds each, of a total; the lines that are told."""

    def told(total, *steps, done=0):
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        with Reporter().progress("check", total, done, "image") as advance:
            for amount, seconds in steps:
                now[0] += seconds
                advance(amount)
        return capsys.readouterr().err.splitlines()

    return told


def test_lines(told):
    steps = ((1, 1.0), (3, LINE_SECONDS - 1), (1, 1.0), (5, 4.0))
    assert told(10, *steps) == [
        "check: 4/10, 0.4 image/s, 15 s left",
        "check: 10/10, 0.7 image/s, 0 s left",
    ]
    assert told(10, (2, 1.0), done=8) == ["check: 10/10, 2.0 image/s, 0 s left"]


def test_lines_without_a_total(told):
    assert told(None, (1, 1.0), (1, 1.0), (6, LINE_SECONDS)) == ["check: 8/?, 0.7 image/s"]


def test_a_sentence_is_told_as_it_is(capsys):
    sentence = "recipe table.yaml:star: [bold]train.losses[0] is :warning:"
    Reporter().say(sentence)
    assert capsys.readouterr().err == f"{sentence}\n"
