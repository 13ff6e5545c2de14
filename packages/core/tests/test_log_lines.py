"""What packages log is told by the command line: of several processes by the first."""

import logging

import pytest

from smalti.core import cli


@pytest.mark.parametrize(("rank", "told"), [(None, "attention by sdpa\n"), ("0", "attention by sdpa\n"), ("1", "")])
def test_the_first_process_tells(monkeypatch, capsys, rank, told):
    logger = logging.getLogger("smalti")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(cli, "app", lambda: logging.getLogger("smalti.generation").info("attention by %s", "sdpa"))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    cli.main()
    assert capsys.readouterr().err == told
