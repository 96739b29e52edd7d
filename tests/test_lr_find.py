"""The learning-rate range test: the engine's numbers, the picture of them, and folders that are whole or absent."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import moe_lab
from moe_lab import cli, lr_find, train
from tiny import TINY, write_data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lr")
    told: list[tuple[int, int]] = []
    run = moe_lab.Run.parse(TINY, write_data(folder / "data"))
    found = train.lr_find(run, lambda made, most: told.append((made, most)))
    assert told == sorted(told)
    assert told[-1] == (500, 500)
    assert sorted(path.name for path in folder.iterdir()) == ["data"]
    return found


def test_rates_rise_to_where_the_loss_leaves_its_minimum(report: dict[str, Any]) -> None:
    points = report["points"]
    rates = [point["learning_rate"] for point in points]
    assert rates[0] == 1e-7
    assert all(abs(b / a - 10 ** (7 / 99)) < 1e-9 for a, b in pairwise(rates))
    means = [point["smoothed"] for point in points]
    assert report["lowest_loss"] == min(means) < 0.8 * means[0]
    assert len(points) == 100 or means[-1] > 5 * min(means) or "diverged" in report["ended"]
    *tried, own = report["probes"]
    assert [probe["learning_rate"] for probe in tried[:2]] == pytest.approx(
        [0.1 * report["lowest_rate"], 0.01 * report["lowest_rate"]]
    )
    best = min(tried, key=lambda probe: probe["loss"])
    assert (report["suggestion"], report["loss_at_suggestion"]) == (best["learning_rate"], best["loss"])
    assert (report["own_rate"], report["loss_at_own_rate"]) == (own["learning_rate"], own["loss"])
    assert report["better"] == (report["loss_at_suggestion"] < report["loss_at_own_rate"])


def test_the_picture_shows_the_points_and_both_rates(report: dict[str, Any]) -> None:
    axes = lr_find.figure(report).axes[0]
    lines = {str(line.get_label()).split(":")[0]: list(line.get_xdata()) for line in axes.get_lines()}
    rates = [point["learning_rate"] for point in report["points"]]
    assert lines["batch"] == lines["mean"] == rates
    assert lines["suggestion"][0] == report["suggestion"]
    assert lines["the run's own rate"][0] == report["own_rate"] == 3e-3
    assert axes.get_xscale() == "log"


def test_the_folder_is_whole_or_absent(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "found"
    assert all(path.is_file() for path in lr_find.save(report, out))
    assert json.loads((out / "lr_find.json").read_text()) == report
    assert (out / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--out"):
        lr_find.refuse_occupied(out)

    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(lr_find.plots, "save", full)
    with pytest.raises(OSError, match="no room"):
        lr_find.save(report, tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]


def test_the_verb_prints_the_table_and_the_suggestion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "".join(f"{key} = {json.dumps(path)}\n" for key, path in write_data(tmp_path).items())
    (tmp_path / "tiny.toml").write_text(data + TINY)
    command = ["moe_lab", "lr-find", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "found")]
    monkeypatch.setattr("sys.argv", command)
    assert cli.main() == 0
    text = capsys.readouterr().out
    assert "1.00e-07" in text
    assert "suggestion" in text
    assert "<- suggestion" in text
    assert "after 100 updates" in text
    assert str(tmp_path / "found" / "lr_find.png") in text
    monkeypatch.setattr("sys.argv", [*command[:-1], str(tmp_path / "json"), "--json"])
    assert cli.main() == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["suggestion"] > 0
    assert len(told["points"]) > 10
    # What is refused leaves no trace.
    monkeypatch.setattr("sys.argv", [*command[:-1], str(tmp_path / "none"), "--set", "train.batch_size=0"])
    assert cli.main() == 2
    assert not (tmp_path / "none").exists()
