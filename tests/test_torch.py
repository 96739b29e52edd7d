"""The torch engine as a person meets it: runs, changes of engine on the way, refusals (numbers: crates/train/tests)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lab import frames
from tiny import TINY, write_data

Done = subprocess.CompletedProcess[str]
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True, scope="module")
def _engine() -> None:
    if "not in this build" in doctor()["engines"]["torch"]:
        pytest.skip("this build has no torch engine: make build-torch")


def cli(*arguments: str, **environment: str) -> Done:
    command = [sys.executable, "-m", "moe_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def doctor() -> dict:
    return json.loads(cli("doctor", "--json").stdout)


def run_file(folder: Path) -> str:
    sets = write_data(folder)
    data = "[data]\n" + "".join(f"{key.removeprefix('data.')} = {json.dumps(path)}\n" for key, path in sets.items())
    (folder / "tiny.toml").write_text(TINY + data)
    return str(folder / "tiny.toml")


def losses(run: Path) -> list[float]:
    return frames.epochs(frames.read_metrics(run))["epoch/loss"].to_list()


def test_doctor_names_the_release_and_the_devices() -> None:
    said = doctor()["engines"]["torch"]
    assert said.startswith("torch 2.11.0")
    assert " on cpu" in said


def test_a_run_trains_as_on_the_cpu_engine(tmp_path: Path) -> None:
    file = run_file(tmp_path)
    for engine in ("cpu", "torch"):
        done = cli("train", file, "--engine", engine, "--out", str(tmp_path / engine))
        assert done.returncode == 0, done.stderr
    ours, theirs = losses(tmp_path / "torch"), losses(tmp_path / "cpu")
    assert len(ours) == 10
    assert ours == pytest.approx(theirs, rel=0.02)
    record = json.loads((tmp_path / "torch" / "run.json").read_text())
    assert record["versions"]["torch"].startswith("2.11.0")
    assert 'engine = "torch"' in (tmp_path / "torch" / "run.toml").read_text()
    # What was trained there is read everywhere: generation and evaluation run on the cpu engine.
    assert cli("generate", str(tmp_path / "torch"), "User: What is 3? Assistant:").returncode == 0


@pytest.mark.parametrize("engines", [("cpu", "torch"), ("torch", "cpu")])
def test_a_stopped_run_goes_on_under_the_other_engine(engines: tuple[str, str], tmp_path: Path) -> None:
    file, out = run_file(tmp_path), tmp_path / "run"
    script = (
        "import sys, moe_lab\n"
        f"run = moe_lab.Run.load({file!r}, {{'engine': {engines[0]!r}}})\n"
        f"trainer = moe_lab.Trainer(run, out={str(out)!r})\n"
        "for row in trainer:\n"
        "    if row['kind'] == 'train' and row['step'] == 20:\n"
        "        trainer.stop()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = cli("resume", str(out), "--engine", engines[1])
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["status"] == "completed"
    whole = tmp_path / "whole"
    assert cli("train", file, "--out", str(whole)).returncode == 0
    assert losses(out) == pytest.approx(losses(whole), rel=0.02)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--engine", "torch", "--device", "gpu"), '"cuda:N"'),
        (("--engine", "cpu", "--device", "cuda"), 'engine = "torch"'),
        (("--engine", "torch", "--device", "cuda:99"), "CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_in_one_sentence(
    flags: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    done = cli("train", run_file(tmp_path), *flags, "--out", str(tmp_path / "run"))
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1
    assert sentence in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("release", [None, "2.10.0"])
def test_another_torch_or_none_is_refused_in_one_sentence(release: str | None, tmp_path: Path) -> None:
    # A torch that says another release, or none, comes first on the path.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m\n"
        "was = m.version\n"
        "def version(name):\n"
        "    if name != 'torch':\n"
        "        return was(name)\n"
        f"    found = {release!r}\n"
        "    if found is None:\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return found\n"
        "m.version = version\n"
    )
    done = cli("doctor", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done
    assert len(done.stderr.strip().splitlines()) == 1
    assert "needs torch 2.11.0" in done.stderr
    assert "pip install torch==2.11.0" in done.stderr


def test_the_launcher_finds_torch_or_says_what_to_do(tmp_path: Path) -> None:
    launcher = Path(__file__).resolve().parent.parent / "crates" / "train" / "launch.sh"
    (tmp_path / "moe-lab").write_text(launcher.read_text())
    (tmp_path / "moe-lab-torch").write_text('#!/bin/sh\necho "$LD_LIBRARY_PATH"\n')
    (tmp_path / "python-without").write_text("#!/bin/sh\necho\n")
    for file in tmp_path.iterdir():
        file.chmod(0o755)

    def start(python: str) -> Done:
        environment = {**os.environ, "PYTHON": python}
        return subprocess.run([tmp_path / "moe-lab"], capture_output=True, text=True, env=environment)

    found = start(sys.executable)
    assert found.returncode == 0, found
    assert (Path(found.stdout.split(":")[0].strip()) / "libtorch_cpu.so").is_file()
    package = tmp_path / "torch"
    (package / "lib").mkdir(parents=True)
    (package / "lib" / "libtorch_cpu.so").touch()
    (package / "version.py").write_text("__version__ = '2.10.0+cpu'\n")
    (tmp_path / "python-old").write_text(f"#!/bin/sh\necho {package}\n")
    (tmp_path / "python-old").chmod(0o755)
    for python, word in (("python-without", "does not have"), ("python-old", "found 2.10.0+cpu")):
        refused = start(str(tmp_path / python))
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1
        assert word in refused.stderr
        assert "install torch==2.11.0" in refused.stderr


def test_the_gpu_benchmark_says_how_to_go_on_where_there_is_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: make bench-gpu measures")
    script = Path(__file__).resolve().parent.parent / "benches" / "gpu.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr
    assert "--pack" in done.stderr


def test_a_step_without_memory_ends_the_run_after_a_checkpoint_of_the_last_one(tmp_path: Path) -> None:
    sets = write_data(tmp_path)
    # One document of 8,000 words makes a batch of 32 a rectangle of 32 x 8,000 x 256 numbers.
    facts = [*json.loads((tmp_path / "facts.json").read_text()) * 6, "zero and one " * 2700 + "</s>"]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    sets |= {"engine": "torch", "threads": 1, "seed": 2, "data.max_length": 8192, "model.hidden_size": 256}
    sets |= {"model.position": {"kind": "rope"}, "train.epochs": 1, "train.batch_size": 32}
    script = (
        "import json, resource, sys, moe_lab\n"
        "run = moe_lab.Run.parse(*json.loads(sys.stdin.read()))\n"
        f"trainer = moe_lab.Trainer(run, out={str(tmp_path / 'run')!r})\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (200 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try:\n"
        "    for row in trainer:\n"
        "        pass\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    given = json.dumps([TINY, sets])
    done = subprocess.run([sys.executable, "-c", script], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no memory left" in done.stdout
    assert "raise train.accumulate" in done.stdout
    steps = [row for row in frames.read_metrics(tmp_path / "run").to_dicts() if row["kind"] == "train"]
    assert f"the checkpoint of step {len(steps)} is complete" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{len(steps)}" / "MANIFEST.json").is_file()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert cli("resume", str(tmp_path / "run"), "--engine", "cpu").returncode == 0
