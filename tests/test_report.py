"""The page of a run: whole, escaped, small, loading nothing, and drawn by a browser where there is one."""

import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moe_lab import report, roadmap, stages
from runs import DENSE, Story, write
from test_stages import FakeLab

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def samples(run: Path, text: str) -> None:
    rows = [{"step": step, "phase": "chat", "epoch": step, "prompt": f"p {text}", "text": text} for step in range(1, 9)]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run whose every text wants to break out."""
    run = write(tmp_path_factory.mktemp("report") / "run", Story(epochs=5, trained=5))
    samples(run, EVIL)
    (run / "run.toml").write_text((run / "run.toml").read_text().replace("hand-made", "<b>bold</b>"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "failed", "argv": [EVIL], "cwd": EVIL}))
    (run / "failure.json").write_text(json.dumps({"step": 3, "reason": EVIL, "remedy": EVIL}))
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 20, "kind": "event", "event": "spike", "message": EVIL}) + "\n")
    return report.write(run)


def test_the_page_loads_nothing_runs_nothing_and_is_small(page: Path) -> None:
    found = Page(page.read_text())
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "iframe", "object", "b"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, attributes)
    assert page.stat().st_size < 3_000_000
    assert not re.search(r"@import|url\((?!#)", page.read_text())


def test_what_a_run_says_stands_there_as_text(page: Path) -> None:
    text = Page(page.read_text()).text
    assert text.count(EVIL) >= report.TEXTS + 4  # samples, prompt, failure, event, provenance
    assert "<b>bold</b>" in text


def test_the_page_tells_results_gate_curves_samples_and_provenance(page: Path) -> None:
    text = Page(page.read_text()).text
    for told in (
        "0.2100",
        "entropy floor",
        "every expert used",
        "Routing",
        "Samples",
        "data.chat.sha256",
        "max_length = 80",
    ):
        assert told in text
    assert page.read_text().count("<svg") == 7


def test_samples_are_spread_from_the_first_to_the_last() -> None:
    texts = [(f"step {index}", "") for index in range(10)]
    assert [place for place, _ in report._spread(texts)] == ["step 0", "step 3", "step 6", "step 9"]
    assert report._spread(texts[:1]) == texts[:1]


def test_a_dense_run_without_samples_has_a_page_too(tmp_path: Path) -> None:
    text = Page(report.write(write(tmp_path / "run", Story(DENSE, epochs=2, trained=2))).read_text()).text
    assert "Routing" not in text
    assert "Samples" not in text


def told_by(page: Path) -> Page:
    found = Page(page.read_text())
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object"}
    assert page.stat().st_size < 3_000_000
    return found


def test_the_page_of_a_stage_tells_what_was_changed_and_what_came_of_it(tmp_path: Path) -> None:
    lab = FakeLab(losses={"stage2c-seed1": 0.3})
    plan = stages.Plan(stage="stage2", options=("2c",), seeds=(1, 2))
    stages.run(plan, tmp_path / "s", lab, lambda text: None)
    for name in ("stage2c", "stage1"):
        samples(tmp_path / "s" / f"{name}-seed1", f"{EVIL} of {name}")
    toml = tmp_path / "s" / "stage2c-seed1" / "run.toml"
    toml.write_text(toml.read_text().replace("epochs = 100", "epochs = 100\nwarmup_epochs = 20"))
    page = report.write(tmp_path / "s")
    text = told_by(page).text
    for told in ("Stage 2: 2c warm-up", "train.warmup_epochs", "option 2c, stage2c", "FAILED"):
        assert told in text
    assert text.count(f"{EVIL} of stage2c") == 2  # prompt and text
    assert page.read_text().count("<svg") + page.read_text().count("<img") == 3 + 2 * 3  # curves; use of experts


def test_the_page_of_the_roadmap_has_its_table_and_its_studies(tmp_path: Path) -> None:
    out = tmp_path / "road"
    roadmap.run(roadmap.Plan(seeds=(1,)), out, FakeLab(), lambda text: None)
    page = report.write(out)
    text = told_by(page).text
    for told in ("3 architecture", "loss ≤ 0.25, L0 ≤ 12, 1.3-1.8", "experts know classes", "stage3a_peak-seed1"):
        assert told in text
    assert "that number ranks nothing" in text


def test_the_page_of_a_roadmap_that_has_hardly_begun(tmp_path: Path) -> None:
    out = tmp_path / "road"
    assert roadmap.run(roadmap.Plan(seeds=(1,)), out, FakeLab(stop_at="baseline-seed1"), lambda text: None).signal == 2
    text = told_by(report.write(out)).text
    assert "stopped" in text
    assert "not run" in text


@pytest.mark.slow
def test_the_page_of_a_roadmap_of_three_seeds_with_its_studies_is_small(tmp_path: Path) -> None:
    """Every model over 200 epochs, and pictures of a study as large as real ones."""
    out = tmp_path / "road"
    roadmap.run(roadmap.Plan(seeds=(1, 2, 3)), out, FakeLab(), lambda text: None)
    noise = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8).tobytes()
    for seed in (1, 2, 3):
        for name in ("coactivation", "lift", "lift_domain", "lift_part", "lift_place", "lift_sentence"):
            (out / "specialization" / f"stage3a_peak-seed{seed}" / f"{name}.png").write_bytes(noise)
    told_by(report.write(out))


def browse(page: Path, folder: Path, *arguments: str) -> float:
    """Opens a page in a browser without a window; it must not complain. Returns the seconds it took."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("SKIPPED: no chromium on this machine")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--window-size=1000,3000", f"--user-data-dir={folder / 'profile'}", *arguments, page.as_uri()]
    home = {**os.environ, "HOME": str(folder)}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=home)
    seconds = time.perf_counter() - start
    assert "CONSOLE" not in done.stderr, done.stderr
    return seconds


LOOKS = {"light": 1, "dark": 0}  # blink's numbers of a preferred colour scheme


@pytest.mark.parametrize("look", LOOKS)
def test_a_browser_opens_it_without_a_complaint(page: Path, tmp_path: Path, look: str) -> None:
    picture = tmp_path / "page.png"
    browse(page, tmp_path, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={LOOKS[look]}")
    assert picture.stat().st_size > 20_000
    corner = imread(picture)[0, 0, :3]
    assert corner.mean() > 0.9 if look == "light" else corner.mean() < 0.2


def test_a_browser_prints_it_without_a_complaint(page: Path, tmp_path: Path) -> None:
    paper = tmp_path / "page.pdf"
    browse(page, tmp_path, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
    assert paper.stat().st_size > 20_000


@pytest.mark.slow
def test_a_browser_opens_the_page_of_a_long_run_within_a_second(tmp_path: Path) -> None:
    """200 epochs; what it takes longer than an empty page, the best of three each: other programs may be at work."""
    page = report.write(write(tmp_path / "run", Story()))
    empty = tmp_path / "empty.html"
    empty.write_text("<!doctype html><title>empty</title>")
    seconds = [
        min(browse(each, tmp_path, f"--screenshot={tmp_path / 'page.png'}") for _ in range(3)) for each in (page, empty)
    ]
    print(f"{page.stat().st_size:,} bytes: {seconds[0]:.2f} s, an empty page {seconds[1]:.2f} s")
    assert page.stat().st_size < 3_000_000
    assert seconds[0] - seconds[1] < 1.0
