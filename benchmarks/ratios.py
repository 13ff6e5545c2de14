"""The table of ratios: what a run of the benchmarks measured, against what is stored, and the page made of it.

`python benchmarks/ratios.py RAW.json` reads pytest-benchmark's JSON (rows: `comparison.py`) and prints the ratios, the
bars missed, and the regressions against `benchmarks/ratios.json`; it ends with 1 where there are any.
`--update` stores the ratios instead and writes the generated parts of `docs/benchmarks.md`.

A table holds a section for each device, `cpu` and `cuda`: `machine`, `versions`, and `ratios`, which are rows with the
`test` that measured them, the `date`, and the `load` of the machine before.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from scipy.stats import t as student

Row = dict[str, Any]
Table = dict[str, Any]

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "ratios.json"
PAGE = ROOT / "docs" / "benchmarks.md"
# One in so many ratios that are as they were is taken for a regression.
FALSE_ALARM = 1 / 1000
PART = re.compile(r"(?<=<!-- ratios: )(.+?)( -->\n)(.*?)(?=<!-- end of ratios -->)", re.DOTALL)
MACHINE, GPU = "the machine", "CUDA GPU"


def measured(raw: dict[str, Any]) -> Table:
    """The table of one run, from pytest-benchmark's JSON."""
    machine = raw["machine_info"]["smalti"]
    date = datetime.fromisoformat(raw["datetime"]).date().isoformat()
    table: Table = {}
    for benchmark in raw["benchmarks"]:
        for row in benchmark["extra_info"].get("ratios", ()):
            names = ("cpu", "cores", "gigabytes") if row["device"] == "cpu" else ("gpu",)
            section = table.setdefault(
                row["device"],
                {"machine": {name: machine[name] for name in names}, "versions": machine["versions"], "ratios": []},
            )
            section["ratios"].append({"test": benchmark["fullname"], "date": date, "load": machine["load"], **row})
    return table


def merged(stored: Table, new: Table) -> Table:
    """The stored table with what was measured now.

    The rows of a test that ran take the place of its old ones; all rows of a section do where the machine or a version
    is another one.
    """
    table = dict(stored)
    for device, section in new.items():
        old = stored.get(device, {})
        tests: dict[str, list[Row]] = {}
        if all(old.get(name) == section[name] for name in ("machine", "versions")):
            for row in old["ratios"]:
                tests.setdefault(row["test"], []).append(row)
        tests |= {row["test"]: [] for row in section["ratios"]}
        for row in section["ratios"]:
            tests[row["test"]].append(row)
        table[device] = {**section, "ratios": [row for rows in tests.values() for row in rows]}
    return table


def regressions(stored: Table, new: Table) -> Iterator[str]:
    """A sentence for every ratio that fell by more than the noise of the turns, then and now.

    A round differs from the median by so much, and two of them by more (Student's t, with as many degrees of freedom
    as there were rounds): a fall within that may be chance. Other machines have other ratios and are not compared.
    """
    for device, section in new.items():
        old = stored.get(device)
        if not old or old["machine"] != section["machine"]:
            continue
        rows = {_key(row): row for row in old["ratios"]}
        for row in section["ratios"]:
            before = rows.get(_key(row), {})
            for name, peers in (("time", "takes"), ("memory", "needs the memory of")):
                if name in row and name in before:
                    band, fall = _noise(before[name], row[name]), row[name]["ratio"] / before[name]["ratio"]
                    if math.log(fall) < -band:
                        yield (
                            f"{_work(row)}: {row['peer']} {peers} {_number(row[name]['ratio'])} times ours, "
                            f"{_number(before[name]['ratio'])} when stored on {before['date']}, a fall of "
                            f"{1 - fall:.0%} with a noise of {1 - math.exp(-band):.0%}."
                        )


def missed(new: Table) -> Iterator[str]:
    """A sentence for every bar that was not reached."""
    for section in new.values():
        for row in section["ratios"]:
            for name in ("time", "memory"):
                found = row.get(name, {})
                if found.get("ratio", 0) < found.get("bar", 0):
                    yield (
                        f"{_work(row)}: {_number(found['ratio'])} times the {name} of ours for {row['peer']}, "
                        f"the bar is {_number(found['bar'])}."
                    )
            if row.get("megabytes", 0) > row.get("most_megabytes", math.inf):
                yield f"{_work(row)}: {_number(row['megabytes'])} MB, the bar is {_number(row['most_megabytes'])}."


def page(text: str, table: Table) -> str:
    """The page with its generated parts made anew: `<!-- ratios: AREA -->` to `<!-- end of ratios -->`.

    Raises:
        ValueError: a part names no area, or an area has no part.
    """
    cpu, cuda = ([*table.get(device, {}).get("ratios", [])] for device in ("cpu", "cuda"))
    parts = {MACHINE: _conditions(table), GPU: _lines(cuda, area=True)}
    for row in cpu:
        parts.setdefault(row["area"], "")
    for area in parts.keys() - {MACHINE, GPU}:
        parts[area] = _lines([row for row in cpu if row["area"] == area])
    there = {match[1] for match in PART.finditer(text)}
    if lacking := sorted(parts.keys() - there):
        raise ValueError(f"the page of benchmarks has no part for {', '.join(lacking)}")
    return PART.sub(lambda match: f"{match[1]}{match[2]}{parts.get(match[1], _lines([]))}", text)


def written(table: Table) -> str:
    """The table as JSON, a row a line."""
    sections = []
    for device, section in sorted(table.items()):
        rows = ",\n".join(f"   {json.dumps(_rounded(row))}" for row in section["ratios"])
        head = ",\n".join(f'  "{name}": {json.dumps(section[name])}' for name in ("machine", "versions"))
        sections.append(f' "{device}": {{\n{head},\n  "ratios": [\n{rows}\n  ]\n }}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("area", "what", "threads", "peer"))


def _noise(before: Row, now: Row) -> float:
    freedom = before["rounds"] + now["rounds"] - 2
    return float(student.ppf(1 - FALSE_ALARM, freedom)) * math.hypot(before["noise"], now["noise"])


def _work(row: Row) -> str:
    threads = "a GPU" if row["device"] == "cuda" else "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['area']}, {row['what']}, {threads}"


def _rounded(value: Any) -> Any:
    """Floats to four digits: more is noise, and would make every line of a diff another."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _seconds(value: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")) if value * scale >= 1)
    return f"{_number(value * scale)} {unit}"


def _bar(bar: float | None, reached: bool) -> str:
    return "" if bar is None else _number(bar) if reached else f"{_number(bar)}, **missed**"


def _cells(row: Row) -> dict[str, str]:
    """A line of a table by the headings of its columns; those that are empty in all lines are left out."""
    ours, memory = [_seconds(row["seconds"])], row.get("memory")
    ours += [f"{_number(rate)} {unit}/s" for unit, rate in row.get("rates", {}).items()]
    cells = {
        "area": row["area"],
        "what": row["what"],
        "threads": str(row["threads"]),
        "ours": ", ".join(ours),
        "peer": row["peer"],
        "peer / ours": f"**{_number(row['time']['ratio'])}** ± {math.expm1(row['time']['noise']):.0%}",
        "bar": _bar(row["time"].get("bar"), row["time"]["ratio"] >= row["time"].get("bar", 0)),
    }
    if memory:
        reached = row["megabytes"] <= row.get("most_megabytes", math.inf)
        cells["MB, ours"] = _number(row["megabytes"])
        cells["most MB"] = _bar(row.get("most_megabytes"), reached)
        cells["MB, peer / ours"] = _number(memory["ratio"])
        cells["bar of MB"] = _bar(memory.get("bar"), memory["ratio"] >= memory.get("bar", 0))
    return cells


def _lines(rows: Sequence[Row], area: bool = False) -> str:
    if not rows:
        return "Nothing measured so far.\n"
    lines = [_cells(row) for row in rows]
    columns = [
        name for name in dict.fromkeys(name for line in lines for name in line) if any(x.get(name) for x in lines)
    ]
    columns = [name for name in columns if name != ("threads" if area else "area")]
    table = [columns, ["---"] * len(columns), *([line.get(name, "") for name in columns] for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _conditions(table: Table) -> str:
    """Where and when, a sentence for each device."""
    return "".join(_conditions_of(device, table.get(device)) for device in ("cpu", "cuda"))


def _conditions_of(device: str, section: Any) -> str:
    title = {"cpu": "CPU", "cuda": GPU}[device]
    if not section:
        return f"- {title}: none measured so far.\n"
    machine, rows = section["machine"], section["ratios"]
    where = (
        machine["gpu"]
        if device == "cuda"
        else f"{machine['cores']} cores of {machine['cpu']}, {machine['gigabytes']} GB"
    )
    dates, loads = sorted({row["date"] for row in rows}), [row["load"] for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    load = f"load average before it {min(loads):.1f}" + (f" to {max(loads):.1f}" if max(loads) > min(loads) else "")
    return f"- {title}: {where}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {load}; {versions}.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 1 where a ratio fell beyond noise and is not stored."""
    parser = argparse.ArgumentParser(description="Compare the ratios of a run with the stored ones.")
    parser.add_argument("raw", type=Path, help="JSON of pytest-benchmark")
    parser.add_argument("--update", action="store_true", help="store the ratios and write docs/benchmarks.md")
    options = parser.parse_args(arguments)
    stored: Table = json.loads(STORED.read_text()) if STORED.exists() else {}
    new = measured(json.loads(options.raw.read_text()))
    rows = [row for section in new.values() for row in section["ratios"]]
    for area in dict.fromkeys(row["area"] for row in rows):
        print(f"\n{area}\n\n{_lines([row for row in rows if row['area'] == area])}", end="")
    print()
    for device, section in new.items():
        if device in stored and stored[device]["machine"] != section["machine"]:
            print(f"The stored ratios are of another machine and are not compared: {stored[device]['machine']}.")
    for sentence in dict.fromkeys(missed(new)):  # a bar of memory stands in the row of every peer
        print(f"Bar missed: {sentence}")
    fallen = [*regressions(stored, new)]
    for sentence in fallen:
        print(f"Regression: {sentence}")
    if options.update:
        text = written(merged(stored, new))
        PAGE.write_text(page(PAGE.read_text(), json.loads(text)))
        STORED.write_text(text)
        print(f"Stored {len(rows)} ratios in {STORED.relative_to(ROOT)} and wrote {PAGE.relative_to(ROOT)}.")
        return 0
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
