"""What the README promises, by the commands it names: minutes of training each, so marked `full` (`make test-full`)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from test_training import stream, weights

pytestmark = pytest.mark.full
ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def moe_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return command(sys.executable, "-m", "moe_lab", *arguments)


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["results"]
    return found


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("full") / "baseline"
    done = command("cargo", "run", "--release", "--quiet", "--", "--out", str(run))
    assert done.returncode == 0, done.stderr
    return run


def test_the_baseline_recites_near_the_floor(baseline: Path) -> None:
    found = results(baseline)
    assert found["excess"] <= 0.03
    assert found["recite"] >= 0.95 * found["recite_total"]
    assert found["unknown_words"] == 0
    assert moe_lab("gate", str(baseline)).returncode == 0


def test_the_binary_and_python_give_the_same_bytes_for_any_threads(tmp_path: Path) -> None:
    binary, python = tmp_path / "binary", tmp_path / "python"
    done = command("cargo", "run", "--release", "--quiet", "--", "--quick", "--threads", "1", "--out", str(binary))
    assert done.returncode == 0, done.stderr
    assert moe_lab("baseline", "--quick", "--threads", "2", "--out", str(python)).returncode == 0
    assert weights(binary) == weights(python)
    assert stream(binary) == stream(python)


def test_stage_1_passes_its_gate(baseline: Path, tmp_path: Path) -> None:
    out = tmp_path / "stage1"
    done = moe_lab("stage1", "--p", "0.4", "--parent", str(baseline), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "stage.json").is_file()
    assert [*(out / "plots").glob("*.png")]


@pytest.mark.parametrize(("position", "published"), [("rope", (1.682, 1.683)), ("cope", (1.661, 1.693))])
def test_shakespeare_reaches_a_number_known_outside(
    position: str, published: tuple[float, float], tmp_path: Path
) -> None:
    out = tmp_path / position
    done = moe_lab("train", f"experiments/shakespeare/{position}.toml", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert min(published) - 0.04 <= results(out)["eval_loss"] <= max(published) + 0.04
