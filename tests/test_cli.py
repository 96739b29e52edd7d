"""The command line as a person meets it: fast help, one-sentence errors, exit statuses, stdout for results only."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moe_lab
from moe_lab import roadmap
from runs import DENSE, Story, write
from tiny import TINY, write_data

Done = subprocess.CompletedProcess[str]
SEED = moe_lab.Run.load("stage1").seed  # of the shipped run file; a stage counts its seeds on from it


def cli(*arguments: str, cwd: Path | None = None, **environment: str) -> Done:
    command = [sys.executable, "-m", "moe_lab", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def refused(*arguments: str, cwd: Path | None = None, code: int = 2) -> str:
    """The sentence of a refusal: one line on stderr, nothing on stdout, no traceback."""
    done = cli(*arguments, cwd=cwd)
    assert done.returncode == code, done
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A run file of the tiny model with data beside it."""
    sets = write_data(tmp_path)
    data = "[data]\n" + "".join(f"{key.removeprefix('data.')} = {json.dumps(path)}\n" for key, path in sets.items())
    (tmp_path / "tiny.toml").write_text(TINY + data)
    return tmp_path / "tiny.toml"


def test_help_is_fast_and_loads_nothing_heavy() -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert cli("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.4
    code = "import sys, moe_lab.cli; assert not {'polars', 'matplotlib', 'moe_lab._native'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_verb_explains_itself() -> None:
    text = cli("--help").stdout
    verbs = re.findall(r"^  ([a-z0-9]+)  ", text.split("Commands:")[1], re.MULTILINE)
    assert {"baseline", "stage1", "train", "resume", "gate", "table", "plot", "generate", "eval", "doctor"} <= set(
        verbs
    )
    for verb in verbs:
        done = cli(verb, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: python -m moe_lab")


def test_version() -> None:
    for arguments in (["--version"], ["baseline", "--version"]):
        done = cli(*arguments)
        assert (done.returncode, done.stdout) == (0, f"moe_lab {moe_lab.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trane"], "trane"),
        (["baseline", "--sett", "a=1"], "--sett"),
        (["train"], "RUN.toml"),
        (["baseline", "--seed", "one"], "--seed"),
        (["baseline", "--set", "seed"], "KEY=VALUE"),
        (["stage1", "--p", "much"], "--p"),
        (["stage1", "--p", "1.5"], "model.router.p"),
        (["stage1", "--p", "0"], "model.router.p"),
        (["stage1", "--seeds", "0"], "--seeds"),
        (["stage1", "--set", "model.router.p=0.3"], "--p"),
        (["stage1", "--parent", "nowhere"], "nowhere"),
        (["stage4", "--option", "2c"], "none of stage4"),
        (["stage2", "--option", "2c", "--parent", "nowhere"], "nowhere"),
        (["stage3", "--set", "nonsense=1"], "nonsense"),
        (["train", "nowhere.toml"], "nowhere.toml"),
        (["resume", "nowhere"], "nowhere"),
        (["reproduce", "nowhere"], "nowhere"),
        (["gate", "nowhere"], "nowhere"),
        (["table", "nowhere"], "nowhere"),
        (["compare", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["watch", "nowhere"], "nowhere"),
        (["specialize", "nowhere"], "nowhere"),
        (["rerun", "nowhere", "--set", "seed=2"], "nowhere"),
        (["sweep", "--set", "seed=2"], "nothing to sweep"),
        (["sweep", "--set", "model.router.pp=0.3,0.4"], "did you mean model.router.p"),
        (["roadmap", "--set", "nonsense=1"], "nonsense"),
        (["roadmap", "--set", "seed=1.5"], "seed = 1.5 is not a whole number"),
        (["stage1", "--set", "seed=true"], "seed = true is not a whole number"),
        (["plot", "nowhere"], "nowhere"),
        (["runs", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
        (["generate", "nowhere", "hello"], "nowhere"),
        (["diff", "baseline", "nowhere.toml"], "nowhere.toml"),
        (["data", "stats", "--chat", "nowhere.json"], "nowhere.json"),
    ],
)
def test_a_bad_command_is_refused_in_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refused(*arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb", ["resume", "reproduce", "table", "gate", "report", "watch", "eval", "specialize", "plot", "tensorboard"]
)
def test_a_run_of_a_newer_program_is_refused_in_one_sentence(tmp_path: Path, verb: str) -> None:
    run = write(tmp_path / "run", Story(epochs=1, trained=1))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "format": 2, "results": "elsewhere"}))
    sentence = "run.json was written by a newer moe_lab (format 2, this one reads 1): update moe_lab"
    assert refused(verb, str(run)).endswith(sentence)
    listed = json.loads(cli("runs", str(tmp_path), "--json").stdout)["runs"]
    assert [entry["status"] for entry in listed] == ["of a newer moe_lab"]


@pytest.mark.parametrize("name", ["stage.json", "roadmap.json"])
@pytest.mark.parametrize("verb", ["resume", "table"])
def test_a_stage_of_a_newer_program_is_refused_in_one_sentence(tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(json.dumps({"format": 2}))
    assert f"{name} was written by a newer moe_lab (format 2" in refused(verb, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train.epoch", "3", "epochs"),
        ("model.hiden_size", "64", "hidden_size"),
        ("train.epochs", '"many"', "train.epochs"),
        ("train.epochs", "-1", "train.epochs"),
        ("model.num_heads", "7", "num_heads"),
        ("model.num_kv_heads", "3", "num_kv_heads"),
        ("model.window", "0", "model.window"),
        ("train.learning_rate", "-1e-4", "train.learning_rate"),
        ("train.learning_rate", "nan", "train.learning_rate"),
        ("train.batch_size", "0", "train.batch_size"),
        ("engine", '"gpu"', "engine"),
        ("data.chat", '"nowhere.json"', "nowhere.json"),
    ],
)
def test_a_bad_value_names_its_key_and_leaves_no_trace(tmp_path: Path, key: str, value: str, words: str) -> None:
    assert words in refused("baseline", "--set", f"{key}={value}", "--out", "run", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "chat.json"),
        ('{"a": 1}', "chat.json"),
        ("[1, 2]", "chat.json"),
        ("[]", "chat.json"),
        ('[""]', "chat.json"),
    ],
)
def test_bad_data_is_refused(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "chat.json").write_text(content)
    assert words in refused("baseline", "--set", "data.chat=chat.json", "--out", "run", cwd=tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_made_is_refused(tiny: Path) -> None:
    (tiny.parent / "file").write_text("")
    assert "file" in refused("train", str(tiny), "--out", str(tiny.parent / "file" / "run"))
    taken = write(tiny.parent / "taken", Story(epochs=1, trained=1))
    before = sorted(path.name for path in taken.iterdir())
    assert "taken" in refused("train", str(tiny), "--out", str(taken))
    assert sorted(path.name for path in taken.iterdir()) == before


def test_a_run_is_trained_shown_and_used(tiny: Path) -> None:
    run = tiny.parent / "run"
    done = cli("train", str(tiny), "--out", str(run), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["status"] == "completed"
    assert told.items() >= json.loads((run / "run.json").read_text())["results"].items()
    assert "epoch" in done.stderr
    text = cli("resume", str(run))
    assert text.returncode == 0
    assert "complete" in text.stderr
    assert "experts/token" in text.stdout
    answer = cli("generate", str(run), "User: What is 3? Assistant:", "--json")
    prompt = "User: What is 3? Assistant:"
    assert json.loads(answer.stdout) == {"prompt": prompt, "text": moe_lab.Model.load(str(run)).generate(prompt)}
    table = cli("table", str(run), "--json")
    assert json.loads(table.stdout)["runs"][0]["loss"] == told["loss"]
    listed = cli("runs", str(tiny.parent), "--json")
    assert [entry["status"] for entry in json.loads(listed.stdout)["runs"]] == ["completed"]
    shutil.copytree(run, tiny.parent / "torn")
    (tiny.parent / "torn" / "run.json").write_text('{"id": ')
    listed = cli("runs", str(tiny.parent), "--json")
    assert {entry["status"] for entry in json.loads(listed.stdout)["runs"]} == {"completed", "damaged run.json"}
    shutil.rmtree(tiny.parent / "torn")
    assert cli("gate", str(run)).returncode == 1
    drawn = cli("plot", str(run))
    assert all(Path(line).exists() for line in drawn.stdout.splitlines())
    assert json.loads(cli("eval", str(run), "--json").stdout)["recite_total"] == 20
    files = [f"--texts={tiny.parent / name}.json" for name in ("facts", "chat")]
    for texts in ([], files):
        studied = cli("specialize", str(run), *texts, "--json")
        assert {row["view"] for row in json.loads(studied.stdout)["information"]} >= {"form", "domain"}
    found = (run / "specialization" / "by_class.csv").read_text()
    assert ",chat.json," in found


def test_a_run_is_reproduced_or_the_difference_is_told(tiny: Path) -> None:
    run, again = tiny.parent / "run", tiny.parent / "again"
    assert cli("train", str(tiny), "--out", str(run)).returncode == 0
    done = cli("reproduce", str(run), "--out", str(again), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["identical"], report["inputs"]) == (True, [])
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"train/l0":', '"train/l0":9', 1))
    other = cli("reproduce", str(run), "--out", str(tiny.parent / "other"))
    assert other.returncode == 1, other.stderr
    assert "DIFFERS from line 1" in other.stdout


def test_a_damaged_checkpoint_is_named_and_not_loaded(tiny: Path) -> None:
    run = tiny.parent / "run"
    assert cli("train", str(tiny), "--out", str(run), "--set", "train.epochs=1").returncode == 0
    weights = (run / "checkpoints" / "latest").resolve() / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    for verb in (["eval", str(run)], ["generate", str(run), "User:"]):
        sentence = refused(*verb, code=1)
        assert "model.safetensors" in sentence
        assert "sha256" in sentence


def test_check_trains_nothing(tiny: Path) -> None:
    done = cli("train", str(tiny), "--check", "--json", "--out", str(tiny.parent / "run"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert not (tiny.parent / "run").exists()
    assert 0 < json.loads(done.stdout)["seconds_estimate"] < 60
    several = cli("stage1", "--check", "--json", "--p", "0.3,0.4", cwd=tiny.parent)
    models = ("parent", "top_p-0.3", "top_p-0.4", "top_k-2")
    assert set(json.loads(several.stdout)) == {f"{model}-seed{SEED}" for model in models}
    assert not (tiny.parent / "runs").exists()


@pytest.mark.full
def test_check_answers_within_two_seconds(tmp_path: Path) -> None:
    """The best of three, Python's start included; a timing, so nothing else should run."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert cli("train", "baseline", "--check", cwd=tmp_path).returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2, seconds


def test_quick_is_recorded_and_not_judged(tiny: Path) -> None:
    run = tiny.parent / "run"
    assert cli("train", str(tiny), "--quick", "--out", str(run)).returncode == 0
    done = cli("gate", str(run))
    assert done.returncode == 0
    assert "not judged (quick)" in done.stdout


def started(tiny: Path, rows: int) -> "subprocess.Popen[str]":
    """A training process that has written so many rows into run/ beside the run file."""
    command = [sys.executable, "-m", "moe_lab", "train", str(tiny), "--set", "train.epochs=400", "--out", "run"]
    process = subprocess.Popen(command, cwd=tiny.parent, stderr=subprocess.PIPE, text=True)
    stream = tiny.parent / "run" / "metrics.jsonl"
    while not stream.exists() or len(stream.read_text().splitlines()) < rows:
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_sigusr1_saves_and_goes_on_and_the_second_sigint_ends_at_once(tiny: Path) -> None:
    process = started(tiny, 20)
    process.send_signal(signal.SIGUSR1)
    checkpoints = tiny.parent / "run" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)  # both may fall into one step
    assert "Traceback" not in text
    resumed = cli("resume", "run", "--json", cwd=tiny.parent)
    assert resumed.returncode == 0, resumed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_everything_and_tells_how_to_go_on(tiny: Path, number: int, code: int) -> None:
    run = tiny.parent / "run"
    command = [sys.executable, "-m", "moe_lab", "train", str(tiny), "--out", str(run), "--set", "train.epochs=3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size < 5000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"resume {run}" in told
    assert "Traceback" not in told
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "stopped"
    step = moe_lab.Trainer.resume(str(run)).step
    assert step == moe_lab.read_metrics(run, "train")["step"].max()


def test_stage_1_in_small(tiny: Path) -> None:
    sets = [f"--set={key}={value}" for key, value in write_data(tiny.parent).items()]
    out = tiny.parent / "stage"
    arguments = ["stage1", "--quick", "--out", str(out), "--json", "--set=model.hidden_size=32", *sets]
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["passed"] is None
    assert [row["name"] for row in told["runs"]] == [
        f"{model}-seed{SEED}" for model in ("parent", "top_p-0.4", "top_k-2")
    ]
    assert (out / "plots" / "loss.png").exists()
    again = cli("resume", str(out), "--json")
    assert again.returncode == 0
    assert again.stderr.count("completed already") == 3


def test_options_in_small(tiny: Path) -> None:
    """Two runs side by side, a study of the parent's experts, the page, the table for a page."""
    sets = [f"--set={key}={value}" for key, value in write_data(tiny.parent).items()]
    small = ["--quick", "--json", "--set=model.hidden_size=32", "--set=checkpoint.every=0", *sets]
    out = tiny.parent / "stage"
    done = cli("stage2", "--option", "2c", "--jobs", "2", "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    names = [f"{name}-seed{SEED}" for name in ("stage1", "stage2c", "stage2c_exponential")]
    assert [row["name"] for row in told["runs"]] == names
    assert {gate["gate"] for gate in told["gates"]} == {"option 2c"}
    assert "train.warmup_epochs" in (out / "report.html").read_text()
    assert (
        cli("diff", str(out / names[0]), str(out / names[1])).stdout.splitlines()[-1].startswith("train.warmup_epochs")
    )
    assert cli("table", str(out), "--markdown").stdout.startswith("|  | stage1 | stage2c | stage2c_exponential |")
    shutil.rmtree(out / names[2])
    again = cli("resume", str(out), "--jobs", "2")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(": started (") == 1  # what is there is kept
    one = cli("resume", str(out / names[0]), "--jobs", "2")
    assert one.returncode == 2
    assert "is one run" in one.stderr
    study = tiny.parent / "study"
    done = cli("stage4", "--option", "4c", "--parent", str(out / names[0]), "--out", str(study), "--quick", "--json")
    assert done.returncode == 0, done.stderr
    assert (study / "specialization" / names[0] / "information.csv").is_file()
    assert "data:image/png" in (study / "report.html").read_text()


def test_a_run_that_diverged_is_explained_and_trained_again_with_a_change(tiny: Path) -> None:
    run, again = str(tiny.parent / "run"), str(tiny.parent / "again")
    diverged = cli("train", str(tiny), "--set", "train.learning_rate=1e30", "--out", run)
    assert diverged.returncode == 3, diverged.stderr
    assert diverged.stderr.strip().splitlines()[-1].startswith("error: diverged at step 2")
    told = json.loads((Path(run) / "failure.json").read_text())
    assert told["step"] == 2
    assert "NaN" in told["reason"]
    assert "train.learning_rate" in told["remedy"]
    refusal = cli("rerun", run, "--out", again)
    assert refusal.returncode == 2
    explanation, sentence = refusal.stderr.strip().splitlines()
    assert told["reason"] in explanation
    assert sentence == "error: the same run fails the same way: change something with --set KEY=VALUE"
    assert not Path(again).exists()
    done = cli("rerun", run, "--set", "train.learning_rate=3e-3", "--out", again, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
    assert not (Path(again) / "failure.json").exists()
    changes = json.loads(cli("diff", run, again, "--json").stdout)["changes"]
    assert [change["key"] for change in changes] == ["train.learning_rate"]


@pytest.mark.slow
def test_the_roadmap_in_small(tiny: Path) -> None:
    """All milestones over tiny data, and the same command again: nothing is trained anew, the page is whole."""
    sets = [f"--set={key}={value}" for key, value in write_data(tiny.parent).items()]
    out = tiny.parent / "road"
    command = ["roadmap", "--quick", "--jobs", "2", "--out", str(out), "--set=model.hidden_size=32", *sets]
    done = cli(*command)
    assert done.returncode == 0, done.stderr
    steps = [step.name for step in roadmap.steps().values() if step.role != "study"]
    assert done.stderr.count(": started (") == len(steps)
    assert all(f" {step} " in done.stdout for step in steps)
    assert done.stdout.count("not judged (quick)") == 2 * len(roadmap.steps())  # gates, and rows of the table
    assert "The roadmap" in (out / "report.html").read_text()
    trained = {path: path.stat().st_mtime_ns for path in out.glob("*-seed*/**/*") if path.is_file()}
    assert len({path.relative_to(out).parts[0] for path in trained}) == len(steps)
    again = cli(*command)
    assert again.returncode == 0, again.stderr
    assert ": started (" not in again.stderr
    assert again.stdout == done.stdout
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


def test_gates_decide_the_exit_status(tmp_path: Path) -> None:
    good = write(tmp_path / "good", Story())
    bad = write(tmp_path / "bad", Story(loss=0.5))
    assert cli("gate", str(good)).returncode == 0
    done = cli("gate", str(bad), "--json")
    assert done.returncode == 1
    criteria = json.loads(done.stdout)["gates"][0]["criteria"]
    assert [each["name"] for each in criteria if not each["passed"]] == ["loss"]
    parent = write(tmp_path / "parent", Story(router=DENSE, loss=0.1))
    assert cli("gate", str(good), "--parent", str(parent)).returncode == 1


def test_diff_prints_the_changed_keys() -> None:
    done = cli("diff", "stage1", "stage1_top2", "--json")
    keys = {change["key"] for change in json.loads(done.stdout)["changes"]}
    assert "model.router.kind" in keys
    assert cli("diff", "baseline", "baseline").stdout == "no difference\n"


def test_schema_docs_stats_and_doctor() -> None:
    assert "properties" in json.loads(cli("config", "schema").stdout)
    assert "model.router" in cli("config", "docs").stdout
    assert json.loads(cli("data", "stats", "--json").stdout)
    assert cli("data", "stats").stdout.strip()
    assert json.loads(cli("doctor", "--json").stdout)
    assert "cores" in cli("doctor").stdout


SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # each holds those before it


@pytest.fixture
def binary() -> Path:
    """The program moe-lab as `make test` builds it."""
    root = Path(__file__).parent.parent
    path = root / os.environ.get("CARGO_TARGET_DIR", "target") / "release" / "moe-lab"
    if not path.exists():
        pytest.skip("SKIPPED: the binary is not built: cargo build --release")
    return path


def bench(binary: Path, isa: str) -> Done:
    command = [str(binary), "bench", "--seconds", "0", "--json", "--no-peak", "--preset", "seed"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MOE_LAB_ISA": isa})


def cpu_flags() -> set[str]:
    cpu = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", cpu.read_text() if cpu.exists() else "", re.MULTILINE)
    return set(found[1].split()) if found else set()


def test_bench_times_steps_under_the_instruction_set_that_is_asked_for(binary: Path) -> None:
    if not {"avx2", "fma"} <= cpu_flags():
        pytest.skip("SKIPPED: this machine has no AVX2")
    done = bench(binary, "avx2")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    shape = {"preset": "seed", "pos": "cope", "dense": False, "moh": True, "dtype": "f32", "tokens_per_step": 640}
    assert told.items() >= shape.items()
    assert told["steps"] >= 3
    for name in ("params", "threads", "tokens_per_second", "ms_per_step", "peak_memory_bytes", "matmul_gflops"):
        assert told[name] > 0, name
    assert told["ms_per_step_best"] <= told["ms_per_step"]
    assert 1 <= told["experts_per_token"] <= 4
    assert (told["peak_gflops"], told["share_of_peak"]) == (None, None)


def test_an_instruction_set_that_the_machine_lacks_is_refused_by_name(binary: Path) -> None:
    told = bench(binary, "sse9").stderr
    has = re.search(r"this machine has ([\w, ]+);", told)
    assert has is not None, told
    sets = has[1].split(", ")
    assert tuple(sets) == SETS[: len(sets)]
    assert told == f'error: MOE_LAB_ISA = "sse9" is no instruction set of moe_lab; {has[0]} unset it for the best\n'
    for isa in (*SETS[len(sets) :], "sse9"):
        done = bench(binary, isa)
        assert (done.returncode, done.stdout) == (2, "")
        assert isa in done.stderr.split("this machine")[0]
        assert has[1] in done.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m moe_lab config schema | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


def test_no_color_is_respected(tmp_path: Path) -> None:
    good = write(tmp_path / "good", Story())
    colour = re.compile(r"\x1b\[[0-9;]*(3[0-8]|9[0-7])m")
    assert colour.search(cli("gate", str(good), FORCE_COLOR="1").stdout)
    assert not colour.search(cli("gate", str(good), FORCE_COLOR="1", NO_COLOR="1").stdout)


def test_the_notebook_snippet_of_the_readme_runs_as_written(tmp_path: Path) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    snippet = readme.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "10 " in done.stdout
