"""The table of ratios: what counts as a regression, what is kept, and the generated parts of the page."""

import importlib.metadata
import json
from types import SimpleNamespace

import comparison
import pytest
import ratios
from comparison import Comparison, Ours

MACHINE = {"cpu": "a CPU", "cores": 2, "gigabytes": 8, "gpu": None, "versions": {"torch": "2"}, "load": 0.25}
PAGE = """# Title

<!-- ratios: the machine -->
<!-- end of ratios -->

By hand.

<!-- ratios: Search -->
old
<!-- end of ratios -->

<!-- ratios: CUDA GPU -->
<!-- end of ratios -->
"""


class Runner:
    """As much of pytest-benchmark's fixture as a comparison uses."""

    def __init__(self):
        self.group, self.disabled, self.extra_info, self.turns = "Search", False, {}, 0

    def pedantic(self, turn, rounds):
        for _ in range(rounds):
            self.turns += 1
            turn()


def row(peer="cdist", what="1024 x 8", ratio=5.0, noise=0.01, device="cpu", **more):
    time = {"ratio": ratio, "noise": noise, "rounds": 5, "bar": 4.0}
    return {
        "area": "Search",
        "what": what,
        "device": device,
        "threads": 1,
        "peer": peer,
        "seconds": 0.002,
        "peer_seconds": 0.002 * ratio,
        "time": time,
        **more,
    }


def raw(*rows, test="test_a", machine=MACHINE):
    return {
        "machine_info": {"smalti": machine},
        "datetime": "2026-11-20T15:00:00.000000+00:00",
        "benchmarks": [{"fullname": test, "extra_info": {"ratios": list(rows)}}, {"fullname": "x", "extra_info": {}}],
    }


def table(*rows, **more):
    return ratios.measured(raw(*rows, **more))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Everything the command reads and writes, in a folder."""
    monkeypatch.setattr(ratios, "ROOT", tmp_path)
    monkeypatch.setattr(ratios, "STORED", tmp_path / "ratios.json")
    monkeypatch.setattr(ratios, "PAGE", tmp_path / "page.md")
    ratios.PAGE.write_text(PAGE)

    def command(*rows, update=False):
        path = tmp_path / "raw.json"
        path.write_text(json.dumps(raw(*rows)))
        return ratios.main([str(path), *["--update"] * update])

    return command


def test_turns_become_rows():
    runner, order = Runner(), []
    compare = Comparison(runner, 2, 3, "cpu")
    ours = [
        Ours(name, lambda name=name: order.append(name), amounts={"images": 4}, bars={"peer": 2.0})
        for name in ("a", "b")
    ]
    compare(ours, {"peer": lambda: order.append("peer")}, rounds=9, peer_scale=10, memory_rounds=2)
    first, second = runner.extra_info["ratios"]
    assert runner.turns == 3
    changes = [name for name, before in zip(order[3:], order[2:], strict=False) if name != before]
    assert changes[:6] == ["a", "b", "peer", "a", "b", "peer"]
    assert (first["what"], second["what"], first["peer"]) == ("a", "b", "peer")
    assert first["time"]["rounds"] == 3
    assert first["time"]["bar"] == 2.0
    assert first["rates"]["images"] == pytest.approx(4 / first["seconds"])
    assert first["memory"]["rounds"] == 2
    assert first["megabytes"] > 0


def test_a_ratio_is_the_median_and_its_noise_the_spread_of_the_turns():
    runner = Runner()
    compare = Comparison(runner, 1, None, "cpu")
    compare.record(Ours("a", list), "peer", ([1.0, 2.0, 1.0], [4.0, 8.0, 4.0]))
    compare.record(Ours("a", list), "peer", ([1.0, 1.0, 1.0], [2.0, 4.0, 8.0]))
    same, spread = (one["time"] for one in runner.extra_info["ratios"])
    assert same == {"ratio": 4.0, "noise": 0.0, "rounds": 3}
    assert spread["ratio"] == 4.0
    assert spread["noise"] == pytest.approx(0.6931, abs=1e-4)  # a factor of two


@pytest.mark.parametrize(("now", "noise", "falls"), [(4.9, 0.01, 0), (4.0, 0.01, 1), (4.0, 0.2, 0), (6.0, 0.01, 0)])
def test_a_fall_beyond_the_noise_is_a_regression(now, noise, falls):
    found = [*ratios.regressions(table(row()), table(row(ratio=now, noise=noise)))]
    assert len(found) == falls
    if falls:
        assert found == [
            "Search, 1024 x 8, 1 thread: cdist takes 4 times ours, 5 when stored on 2026-11-20, "
            "a fall of 20% with a noise of 6%."
        ]


def test_memory_falls_likewise():
    memory = {"megabytes": 2.0, "peer_megabytes": 20.0, "memory": {"ratio": 10.0, "noise": 0.0, "rounds": 3}}
    worse = {**memory, "memory": {"ratio": 5.0, "noise": 0.0, "rounds": 3}}
    (found,) = ratios.regressions(table(row(**memory)), table(row(**worse)))
    assert "cdist needs the memory of 5 times ours, 10 when stored" in found


def test_another_machine_is_not_compared():
    other = table(row(ratio=1.0), machine={**MACHINE, "cores": 64})
    assert not [*ratios.regressions(table(row()), other)]
    assert ratios.merged(table(row(), test="test_b"), other) == other


def test_bars_missed():
    (found,) = ratios.missed(table(row(ratio=3.5), row(peer="other")))
    assert found == "Search, 1024 x 8, 1 thread: 3.5 times the time of ours for cdist, the bar is 4."
    (found,) = ratios.missed(table(row(megabytes=5.0, most_megabytes=3.0)))
    assert found == "Search, 1024 x 8, 1 thread: 5 MB, the bar is 3."


def test_what_was_measured_takes_the_place_of_the_rows_of_its_tests():
    stored = ratios.merged(table(row(), row(peer="gone")), table(row(what="kept"), test="test_b"))
    rows = ratios.merged(stored, table(row(ratio=7.0)))["cpu"]["ratios"]
    assert [(one["what"], one["peer"], one["time"]["ratio"]) for one in rows] == [
        ("1024 x 8", "cdist", 7.0),
        ("kept", "cdist", 5.0),
    ]


def test_the_page_keeps_what_is_written_by_hand():
    memory = {"ratio": 50.0, "noise": 0.0, "rounds": 3, "bar": 100.0}
    rows = [row(megabytes=4.0, peer_megabytes=200.0, memory=memory), row("gemm", ratio=3.0, rates={"images": 1234.5})]
    made = ratios.page(PAGE, table(*rows))
    assert made.startswith("# Title\n\n<!-- ratios: the machine -->\n- CPU: 2 cores of a CPU, 8 GB; 2026-11-20, load ")
    assert "\nBy hand.\n" in made
    assert (
        "| what | threads | ours | peer | peer / ours | bar | MB, ours | MB, peer / ours | bar of MB |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        "| 1024 x 8 | 1 | 2 ms | cdist | **5** ± 1% | 4 | 4 | 50 | 100, **missed** |\n"
        "| 1024 x 8 | 1 | 2 ms, 1,234 images/s | gemm | **3** ± 1% | 4, **missed** |  |  |  |\n"
        "<!-- end of ratios -->"
    ) in made
    assert "- CUDA GPU: none measured so far.\n" in made
    assert "<!-- ratios: CUDA GPU -->\nNothing measured so far.\n" in made
    assert ratios.page(made, table(*rows)) == made


def test_a_gpu_has_a_part_of_its_own():
    gpu = table(row(device="cuda"), machine={**MACHINE, "gpu": "a GPU"})
    made = ratios.page(PAGE, gpu)
    assert "- CPU: none measured so far.\n- CUDA GPU: a GPU; 2026-11-20" in made.replace("\n\n", "\n")
    assert "| area | what | ours |" in made


def test_an_area_without_a_part_is_refused():
    with pytest.raises(ValueError, match=r"^the page of benchmarks has no part for Search$"):
        ratios.page(PAGE.replace("ratios: Search", "ratios: Another"), table(row()))


def test_the_command_stores_and_then_reports(files, capsys):
    assert files(row(), update=True) == 0
    assert "Stored 1 ratios in ratios.json and wrote page.md." in capsys.readouterr().out
    assert json.loads(ratios.STORED.read_text())["cpu"]["ratios"][0]["time"]["ratio"] == 5.0
    page = ratios.PAGE.read_text()
    assert files(row(ratio=4.99)) == 0
    assert files(row(ratio=3.0)) == 1
    told = capsys.readouterr().out
    assert "Regression: Search, 1024 x 8, 1 thread: cdist takes 3 times ours" in told
    assert "Bar missed: Search, 1024 x 8, 1 thread: 3 times the time of ours" in told
    assert ratios.PAGE.read_text() == page


def test_the_page_in_the_repository_is_made_of_the_stored_table():
    text = ratios.PAGE.read_text()
    assert ratios.page(text, json.loads(ratios.STORED.read_text())) == text


def test_versions_are_found_however_names_are_spelt(monkeypatch):
    spelt = {"Pillow": "12", "torch_fidelity": "0.4", "vector-quantize-pytorch": "1", "left-out": "3"}
    found = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in spelt.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(comparison, "_cuda", lambda: None)  # which imports torch, which asks for them
    told = {"cpu": {}, "python_version": "3.11"}
    comparison.pytest_benchmark_update_machine_info(told)
    assert told["smalti"]["versions"] == {
        "python": "3.11",
        "pillow": "12",
        "vector-quantize-pytorch": "1",
        "torch-fidelity": "0.4",
    }
