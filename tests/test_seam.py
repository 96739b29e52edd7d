"""The compiled module: as its stub says, frozen, one version, and a good citizen of Python's threads and signals."""

import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

import moe_lab
from moe_lab import _native, train
from tiny import TINY, write_data

ROOT = Path(__file__).resolve().parent.parent
CLASSES = [_native.Run, _native.Trainer, _native.Model]


def test_the_stub_says_what_the_module_has() -> None:
    found = subprocess.run([sys.executable, "-m", "mypy.stubtest", "moe_lab._native"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_version_is_the_workspaces() -> None:
    manifest = tomllib.loads((ROOT / "Cargo.toml").read_text())
    assert moe_lab.__version__ == manifest["workspace"]["package"]["version"]


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_say_where_they_live(kind: type) -> None:
    assert kind.__module__ == "moe_lab"


def test_every_class_is_frozen() -> None:
    """So no Python call can hold one mutably while another thread reads it; state sits in a Mutex."""
    sources = "".join(path.read_text() for path in (ROOT / "crates" / "bindings" / "src").glob("*.rs"))
    classes = re.findall(r"#\[pyclass(.*?)\]", sources)
    assert len(classes) == len(CLASSES)
    assert all(re.search(r"\bfrozen\b", options) for options in classes)


def test_properties_cannot_be_written() -> None:
    run = moe_lab.Run.parse(TINY)
    with pytest.raises(AttributeError):
        run.seed = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        run.anything = 2  # type: ignore[attr-defined]


def test_the_error_of_divergence_is_a_runtime_error_of_the_package() -> None:
    assert issubclass(moe_lab.DivergedError, RuntimeError)
    assert moe_lab.DivergedError.__module__ == "moe_lab"


def test_names_are_loaded_when_they_are_used() -> None:
    code = "import sys, moe_lab; assert not {'polars', 'matplotlib', 'numpy', 'moe_lab._native'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(moe_lab.__all__) <= set(dir(moe_lab))
    assert all(getattr(moe_lab, name) is not None for name in moe_lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = moe_lab.Trainr


def test_figures_need_no_compiled_module() -> None:
    code = "import sys, moe_lab; moe_lab.plots, moe_lab.read_metrics; assert 'moe_lab._native' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_imports_fast() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import moe_lab"], check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_a_run_round_trips_through_toml() -> None:
    run = moe_lab.Run.parse(TINY, {"seed": 5, "model.router.p": 0.6})
    again = moe_lab.Run.parse(run.to_toml())
    assert run.diff(again) == []
    assert again.seed == 5
    changes = run.diff(moe_lab.Run.parse(TINY, {"seed": 5}))
    assert [key for key, _, _ in changes] == ["model.router.p"]


def test_a_bad_override_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"model\.router\.p"):
        moe_lab.Run.load("stage1", {"model.router.p": 1.5})
    with pytest.raises(ValueError, match=r"train\.epochs"):
        moe_lab.Run.load("baseline", {"train.epochs": "many"})


def test_a_trainer_works_in_another_thread_while_this_one_goes_on(tmp_path: Path) -> None:
    run = moe_lab.Run.parse(TINY, write_data(tmp_path))
    rows: list[dict[str, object]] = []
    worker = threading.Thread(target=lambda: rows.extend(moe_lab.Trainer(run, out=str(tmp_path / "run"))))
    worker.start()
    turns = 0
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    worker.join()
    assert rows[-1]["step"]
    assert turns > 3


def test_a_trainer_is_an_iterator(tmp_path: Path) -> None:
    trainer = moe_lab.Trainer(moe_lab.Run.parse(TINY, write_data(tmp_path)), out=str(tmp_path / "run"))
    assert iter(trainer) is trainer
    assert inspect.isroutine(trainer.stop)
    steps = [row["step"] for row in trainer if row["kind"] == "train"]
    assert steps == list(range(1, trainer.total_steps + 1))
    assert trainer.done
    assert next(trainer, None) is None


def test_ctrl_c_in_a_plain_loop_stops_at_a_step_and_the_run_goes_on_later(tmp_path: Path) -> None:
    run = moe_lab.Run.parse(TINY, write_data(tmp_path) | {"train.epochs": 2000})
    trainer = moe_lab.Trainer(run, out=str(tmp_path / "run"))
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012 (the signal comes somewhere in the loop)
        timer.start()
        for _ in trainer:
            pass
    trainer.stop()
    assert trainer.done
    stopped = trainer.step
    del trainer
    resumed = moe_lab.Trainer.resume(str(tmp_path / "run"))
    assert resumed.step == stopped
    assert next(resumed)["step"] >= stopped
    resumed.stop()


def test_run_training_in_another_thread_needs_no_signal_handler(tmp_path: Path) -> None:
    run = moe_lab.Run.parse(TINY, write_data(tmp_path))
    outcomes: list[train.Outcome] = []
    worker = threading.Thread(target=lambda: outcomes.append(train.run_training(run, str(tmp_path / "run"))))
    worker.start()
    worker.join()
    assert outcomes[0].out == str(tmp_path / "run")


def test_a_model_gives_logits_and_routes(tmp_path: Path) -> None:
    run = moe_lab.Run.parse(TINY, write_data(tmp_path))
    for _ in moe_lab.Trainer(run, out=str(tmp_path / "run")):
        pass
    model = moe_lab.Model.load(str(tmp_path / "run"))
    text = "User: What is 3? Assistant:"
    logits = model.logits(text)
    assert logits.dtype == np.float32
    assert logits.shape[1] == model.vocab_size
    routed = model.route(text)
    assert len(routed["tokens"]) == logits.shape[0]
    for layer in routed["layers"]:
        assert np.allclose(layer["probabilities"].sum(axis=1), 1.0, atol=1e-5)
        assert [len(experts) for experts in layer["experts"]] == [len(weights) for weights in layer["weights"]]
        assert all(layer["experts"])
    assert model.generate(text, cache=True) == model.generate(text, cache=False)
    assert model.num_parameters > 1000
