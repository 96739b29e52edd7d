"""The compiled module under stress: whatever Python does to it, an exception comes back, never a crash or a panic."""

import copy
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_lab
from moe_lab import _native
from moe_lab.text import shown
from tiny import TINY, write_data

Documents = list[list[int]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stress")
    for _ in moe_lab.Trainer(run_in(folder), out=str(folder / "run")):
        pass
    return folder / "run"


def run_in(folder: Path, **changes: object) -> moe_lab.Run:
    return moe_lab.Run.parse(TINY, write_data(folder) | changes)


def gradients(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "config_toml": TINY, "weights_path": None, "documents": [[1, 2, 3]], "vocab_size": 9,
        "engine": "cpu", "dtype": "f32",
    }  # fmt: skip
    return _native.loss_and_gradients(**(arguments | changes))


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"model": value}
    return value


def endless() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


def parsed(overrides: dict[str, object]) -> tuple[moe_lab.Run | None, str]:
    """The run, or the sentence of its refusal."""
    try:
        return moe_lab.Run.parse(TINY, overrides), ""
    except (ValueError, TypeError) as error:
        return None, str(error)


class Raises:
    """An object whose every conversion fails."""

    def __index__(self) -> int:
        raise ZeroDivisionError("index")

    def __float__(self) -> float:
        raise ZeroDivisionError("float")

    def __len__(self) -> int:
        raise ZeroDivisionError("len")

    def __iter__(self) -> "Raises":
        raise ZeroDivisionError("iter")


@pytest.mark.parametrize(
    "value",
    [
        nested(100_000), endless(), itertools.count(), {1: 2}, {"a": {2: 3}}, object(), Raises(), b"bytes", "\ud800",
        float("nan"), float("inf"), 2**63, 2**70, -(2**70), 1e308, range(2**40), lambda: None, np.zeros((3, 3)),
        np.array("x"), np.float16(7.5), np.array([[object()]]), "x" * 10_000_000, [[]] * 100, set(), type,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_any_value_of_an_override_is_refused_in_words(value: object) -> None:
    for key in ("seed", "model.router.p", "train", "eval.samples", "data.facts"):
        run, sentence = parsed({key: value})
        assert sentence if run is None else moe_lab.Run.parse(run.to_toml()).diff(run) == []


@pytest.mark.parametrize("key", ["", ".", "a..b", "x" * 10_000_000, "." * 100_000, "\0", "\ud800", "extends", "model"])
def test_any_key_of_an_override_is_refused_in_words(key: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        moe_lab.Run.parse(TINY, {key: 1})


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 100_000, "[" * 100_000, "\0", "a" * 10_000_000, "a.b." * 50_000 + "c=1"]
)
def test_hostile_toml_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        moe_lab.Run.parse(text)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vocab_size": 2**60}, ValueError),
        ({"vocab_size": 2**40}, ValueError),
        ({"vocab_size": -1}, OverflowError),
        ({"vocab_size": 0}, ValueError),
        ({"documents": [[1, 2**32]]}, OverflowError),
        ({"documents": [[1, -1]]}, OverflowError),
        ({"documents": [[1, 9]]}, ValueError),
        ({"documents": [[]]}, ValueError),
        ({"documents": [[1]]}, ValueError),
        ({"documents": ["ab"]}, TypeError),
        ({"documents": [[1.5, 2.5]]}, TypeError),
        ({"documents": [None]}, TypeError),
        ({"documents": np.zeros((2, 3), dtype=np.float32)}, TypeError),
        ({"documents": np.zeros((2, 3), dtype=object)}, None),
        ({"documents": np.arange(24, dtype=np.int64).reshape(2, 12)[:, ::4] % 9}, None),  # strided, another dtype
        ({"documents": np.asfortranarray(np.ones((2, 3), dtype=np.uint8))}, None),
        ({"documents": [[1, 2]] * 3, "weights_path": "/nowhere/model.safetensors"}, RuntimeError),
        ({"weights_path": "/nowhere/model.pt"}, RuntimeError),
        ({"weights_path": "\0"}, (RuntimeError, ValueError)),
        ({"weights_path": "\ud800"}, ValueError),
        ({"config_toml": "\ud800"}, ValueError),
        ({"engine": "x" * 1_000_000}, ValueError),
        ({"dtype": "f8"}, ValueError),
    ],
)
def test_arguments_of_any_kind_become_exceptions(changes: dict[str, Any], error: type[Exception] | None) -> None:
    if error is None:
        assert gradients(**changes)["cross_entropy"] > 0
        return
    with pytest.raises(error) as caught:
        gradients(**changes)
    assert isinstance(caught.value, Exception)  # pyo3's PanicException is none


def test_arrays_outlive_what_they_came_from_and_belong_to_python(trained: Path) -> None:
    model = moe_lab.Model.load(str(trained))
    logits = model.logits("What is 3?")
    probabilities = model.route("What is 3?")["layers"][0]["probabilities"]
    again = logits.copy()
    del model
    gc.collect()
    assert np.array_equal(logits, again)
    logits[:] = 0  # writing to a copy reaches nothing else
    assert probabilities.flags.writeable
    assert probabilities.flags.c_contiguous
    found = gradients()
    array = next(iter(found["gradients"].values()))
    del found
    gc.collect()
    assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"max_tokens": -1}, OverflowError),
        ({"max_tokens": 2**70}, OverflowError),
        ({"max_tokens": 2**62}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": -1.0}, ValueError),
        ({"top_p": 0.0}, ValueError),
        ({"top_p": float("inf")}, ValueError),
        ({"top_k": -1}, OverflowError),
        ({"seed": -1}, OverflowError),
        ({"prompt": ""}, ValueError),
        ({"prompt": "\ud800"}, ValueError),
        ({"prompt": 3}, TypeError),
        ({"prompt": None}, TypeError),
    ],
)
def test_generation_refuses_what_it_cannot_do(trained: Path, arguments: dict[str, Any], error: type[Exception]) -> None:
    model = moe_lab.Model.load(str(trained))
    with pytest.raises(error):
        model.generate(**({"prompt": "What"} | arguments))
    assert isinstance(model.generate("What", max_tokens=2, temperature=1e300, top_k=2**60), str)
    assert isinstance(model.generate("\0\x1b[2J", max_tokens=1), str)


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda each: each.__name__)
def test_objects_of_the_engine_are_not_copied(trained: Path, copier: Callable[[object], object]) -> None:
    run = moe_lab.Run.parse(TINY)
    for each in (run, moe_lab.Model.load(str(trained)), moe_lab.Trainer.resume(str(trained))):
        with pytest.raises(TypeError):
            copier(each)


@pytest.mark.parametrize("kind", [_native.Run, _native.Model])
def test_classes_have_no_back_door(kind: type) -> None:
    with pytest.raises(TypeError):
        kind()
    with pytest.raises(TypeError):
        kind.__new__(kind)
    with pytest.raises(TypeError):
        type("Child", (kind,), {})
    with pytest.raises(TypeError):
        object.__new__(kind)


def test_an_exception_in_the_loop_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    trainer = moe_lab.Trainer(run_in(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 (the exception comes out of the loop)
        for row in trainer:
            if row.get("step") == 3:
                raise ZeroDivisionError
    trainer.stop()
    for _ in range(3):  # use after its end
        assert next(trainer, None) is None or trainer.done
        trainer.stop()
    assert trainer.step >= 3
    del trainer
    assert sum(1 for _ in moe_lab.Trainer.resume(str(tmp_path / "run"))) > 3


def test_threads_share_a_trainer_and_a_model(tmp_path: Path, trained: Path) -> None:
    trainer = moe_lab.Trainer(run_in(tmp_path), out=str(tmp_path / "run"))

    def drain(_: int) -> list[int]:
        return [row["step"] for row in trainer if row["kind"] == "train"]

    with ThreadPoolExecutor(4) as pool:
        steps = sorted(itertools.chain(*pool.map(drain, range(4))))
    assert steps == list(range(1, trainer.total_steps + 1))
    model = moe_lab.Model.load(str(trained))
    with ThreadPoolExecutor(4) as pool:
        texts = set(pool.map(lambda _: model.generate("User: What is 3? Assistant:", max_tokens=8), range(12)))
    assert len(texts) == 1


def test_a_trainer_dies_in_another_thread_than_it_was_born(tmp_path: Path) -> None:
    holder = [moe_lab.Trainer(run_in(tmp_path), out=str(tmp_path / "run"))]
    next(holder[0])
    worker = threading.Thread(target=holder.clear)
    worker.start()
    worker.join()
    gc.collect()
    assert moe_lab.Trainer.resume(str(tmp_path / "run")).step == 0


def _in_child(trainer: moe_lab.Trainer, model: moe_lab.Model, folder: str, answers: Any) -> None:
    step, text = lambda: trainer.step, lambda: model.generate("What")
    for use in (lambda: next(trainer), trainer.stop, trainer.save, step, text):
        try:
            use()
            answers.put("no exception")
        except RuntimeError as error:
            answers.put(str(error))
    run = moe_lab.Run.parse(TINY, write_data(Path(folder) / "child"))
    answers.put(sum(1 for _ in moe_lab.Trainer(run, out=folder + "/child/run")))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_gets_exceptions_and_can_make_objects_of_its_own(tmp_path: Path, trained: Path) -> None:
    trainer = moe_lab.Trainer(run_in(tmp_path), out=str(tmp_path / "run"))
    next(trainer)
    model = moe_lab.Model.load(str(trained))
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(trainer, model, str(tmp_path), answers))
    child.start()
    found = [answers.get() for _ in range(6)]
    child.join(60)
    assert child.exitcode == 0
    assert all("made in another process" in each for each in found[:5])
    assert found[5] > 3
    assert next(trainer)["step"] >= 0  # the parent goes on, and still owns its run
    with pytest.raises(BlockingIOError):
        moe_lab.Trainer.resume(str(tmp_path / "run"))


def test_ctrl_c_at_any_moment_is_a_keyboard_interrupt(tmp_path: Path) -> None:
    """A signal after some milliseconds, again and again, also while a step is computed or saved."""
    code = (
        "import signal, sys, moe_lab\n"
        "run = moe_lab.Run.load(sys.argv[1], {'train.epochs': 400, 'checkpoint.every': 2})\n"
        "trainer = moe_lab.Trainer(run, out=sys.argv[2])\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "seen = 0\n"
        "while seen < 60:\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 0.002 + seen % 7 / 1000)\n"
        "        for row in trainer: pass\n"
        "    except KeyboardInterrupt:\n"
        "        seen += 1\n"
        "trainer.stop()\n"
        "print(trainer.step)\n"
    )
    path = tmp_path / "tiny.toml"
    sets = write_data(tmp_path)
    path.write_text(
        TINY + "[data]\n" + "".join(f"{key.removeprefix('data.')} = {json.dumps(v)}\n" for key, v in sets.items())
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert moe_lab.Trainer.resume(str(tmp_path / "run")).step == int(done.stdout)


def test_a_signal_that_kills_leaves_no_crash_behind(tmp_path: Path) -> None:
    """SIGTERM without a handler ends the process; the lock goes with it and the run goes on."""
    run = run_in(tmp_path, **{"checkpoint.every": 2, "train.epochs": 400})
    pid = os.fork()
    if pid == 0:
        for _ in moe_lab.Trainer(run, out=str(tmp_path / "run")):
            if any((tmp_path / "run" / "checkpoints").glob("checkpoint-*")):  # they are written beside the training
                os.kill(os.getpid(), signal.SIGTERM)
        os._exit(9)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert moe_lab.Trainer.resume(str(tmp_path / "run")).step >= 2


def test_no_text_commands_the_terminal() -> None:
    hostile = "a\x1b[2J\x1b]0;t\x07\r\x9b31m\u202etxt\u2066\x00\ud800\u2028"
    assert shown(hostile) == "a�[2J�]0;t���31m�txt����"
    assert shown("plain ä 日本\n\tline") == "plain ä 日本\n\tline"


def test_escapes_in_names_and_errors_do_not_reach_the_terminal(tmp_path: Path) -> None:
    name = tmp_path / "a\x1b[31mred[bold]"
    name.mkdir()
    (name / "run.toml").write_text('x = "\x1b[2J')
    for verb in ("resume", "generate", "table"):
        arguments = [verb, str(name), *(["hello"] if verb == "generate" else [])]
        done = subprocess.run([sys.executable, "-m", "moe_lab", *arguments], capture_output=True, text=True)
        assert done.returncode == 2, (verb, done)
        assert "\x1b" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["model.pt", "weights.bin", "a.ckpt", "a.pkl", "a.pth"])
def test_pickles_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04\x95")
    with pytest.raises(ValueError, match="pickle"):
        moe_lab.Model.load(str(tmp_path / name))
