"""Reports over finished runs: honest tables, and pages that need nothing but themselves."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from commcomp.telemetry import figures, report
from commcomp.telemetry.runs import format_bytes, load_runs

SVG = "data:image/svg+xml;base64,"


def result(name: str = "plain DDP", method: str = "none", **changes: Any) -> dict[str, Any]:
    steps = changes.get("steps", 40)
    plain = {
        "name": name,
        "config": {"gradient": {"method": method}},
        "world_size": 2,
        "parameters": 10_800_000,
        "machine": {"processor": "Some CPU", "cores": 2, "system": "Linux x86_64", "device": "cpu"},
        "link_rate": "100mbit",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "commcomp": "0.1.0"},
        "git_revision": "0123456789ab",
        "steps": steps,
        "train_loss": [5.5 - 0.01 * step for step in range(steps)],
        "step_seconds": [4.0] * steps,
        "held_out": [[steps // 2, 80.0, 5.0], [steps, 160.0, 4.5]],
        "median_step_seconds": 4.0,
        "tokens_per_second": 256.0,
        "cpu_seconds_per_step": {"rank_0": 0.5, "mean": 0.6},
        "wire_bytes_per_step": 43_000_000.0,
        "dense_wire_bytes_per_step": 43_000_000.0,
        "ratio": 1.0,
    }
    return {**plain, **changes}


def low_rank(**changes: Any) -> dict[str, Any]:
    values = {"median_step_seconds": 0.5, "step_seconds": [0.5] * 40, "wire_bytes_per_step": 123_400.0, "ratio": 348.46}
    return result("low_rank rank=4 int8", "low_rank", **{**values, **changes})


@pytest.fixture
def folders(tmp_path: Path) -> Any:
    def write(*results: dict[str, Any]) -> list[Path]:
        paths = [tmp_path / f"run{index}" for index in range(len(results))]
        for path, content in zip(paths, results):
            path.mkdir()
            (path / "result.json").write_text(json.dumps(content))
        return paths

    return write


def test_the_table_has_the_honest_columns(folders: Any) -> None:
    headings, plain, compressed = report.table_of(load_runs(folders(result(), low_rank())))
    row = dict(zip(headings, compressed))
    assert row["held-out loss"] == "4.500"
    assert row["step time"] == "0.500 s"
    assert row["speed-up"] == "8.00x"
    assert row["bytes a step"] == "123 kB"
    assert row["ratio"] == "348.5x"
    assert dict(zip(headings, plain))["speed-up"] == "1.00x"


def test_without_a_plain_run_no_speed_up_is_claimed_and_nothing_sent_has_no_ratio(folders: Any) -> None:
    silent = result("no_communication", "no_communication", ratio=None, wire_bytes_per_step=0.0)
    headings, _, row = report.table_of(load_runs(folders(low_rank(), silent)))
    cells = dict(zip(headings, row))
    assert cells["speed-up"] == cells["ratio"] == "-"
    assert cells["bytes a step"] == "0 bytes"


def test_short_runs_and_unequal_runs_come_with_a_caution(folders: Any) -> None:
    runs = load_runs(folders(result(), low_rank(link_rate="1gbit", steps=30)))
    cautions = " ".join(report.cautions_of(runs))
    assert "fewer than 400 steps" in cautions
    assert "step counts" in cautions
    assert "link rates" in cautions
    assert "machines" not in cautions


def test_long_equal_runs_need_no_caution(folders: Any) -> None:
    runs = load_runs(folders(result(steps=400), low_rank(steps=400, step_seconds=[0.5] * 400)))
    assert report.cautions_of(runs) == []


def test_facts_name_machine_link_versions_and_revision(folders: Any) -> None:
    facts = dict(report.facts_of(load_runs(folders(result(), low_rank(link_rate=None)))))
    assert facts["Link between them"] == "100mbit each way / not limited"
    assert facts["Machine"] == "Some CPU, 2 cores, Linux x86_64"
    assert "torch 2.13.0" in facts["Versions"]
    assert facts["Revision"] == "0123456789ab"


def test_runs_of_equal_names_are_told_apart(folders: Any) -> None:
    first, second = load_runs(folders(low_rank(), low_rank()))
    assert first.name != second.name
    assert "run1" in second.name


def test_the_command_writes_markdown_png_and_html(folders: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "report"
    assert report.main([*map(str, folders(result(), low_rank())), "--out", str(out)]) == 0
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    markdown = (out / "report.md").read_text()
    assert markdown.startswith("| run | steps |")
    assert "| low_rank rank=4 int8 | 40 |" in markdown
    printed = capsys.readouterr().out
    assert "low_rank rank=4 int8" in printed
    assert str(out / "report.html") in printed


def test_the_page_loads_nothing_and_fits_narrow_and_dark_screens(folders: Any, tmp_path: Path) -> None:
    runs = load_runs(folders(result("plain <DDP> & co"), low_rank()))
    page = report.write_report(runs, tmp_path)["html"].read_text()
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 2 * len(figures.PANELS)  # light and dark
    assert all(source.startswith(SVG) for source in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert "plain &lt;DDP&gt; &amp; co" in page
    assert "<DDP>" not in page


def test_plots_embed_no_outside_resource(folders: Any) -> None:
    runs = load_runs(folders(result(), low_rank()))
    for draw in figures.PANELS.values():
        svg = figures.svg_of(draw, runs, "dark").decode()
        assert not re.search(r'(?:href|src)="(?!#)', svg)
        assert "url(http" not in svg


def test_runs_that_diverged_or_never_evaluated_are_still_shown(folders: Any, tmp_path: Path) -> None:
    diverged = low_rank(train_loss=[math.nan] * 40, held_out=[], wire_bytes_per_step=0.0, ratio=None)
    runs = load_runs(folders(result(), diverged))
    row = dict(zip(*(report.table_of(runs)[index] for index in (0, 2))))
    assert (row["training loss"], row["held-out loss"]) == ("nan", "-")
    assert report.write_report(runs, tmp_path)["png"].stat().st_size > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "result.json does not exist"),
        ("{", "not valid JSON"),
        (json.dumps({"name": "x", "config": {"gradient": {}}}), "lacks"),
        (json.dumps(result(train_loss=[])), "no steps"),
    ],
)
def test_bad_runs_are_named(content: str | None, message: str, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "bad_run"
    run.mkdir()
    if content is not None:
        (run / "result.json").write_text(content)
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "bad_run" in error
    assert message in error


def test_missing_matplotlib_is_named(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([*map(str, folders(result())), "--out", str(tmp_path / "out")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_smoothing_starts_without_bias() -> None:
    assert figures.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (23_456, "23.5 kB"), (43e6, "43 MB"), (2e9, "2 GB")]
)
def test_sizes(size: float, text: str) -> None:
    assert format_bytes(size) == text
