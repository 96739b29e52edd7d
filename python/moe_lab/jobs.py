"""Several trainings side by side, each in a process of its own; a signal reaches them all and each saves itself."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Any, cast

Say = Callable[[str], None]  # takes a line of progress


@dataclass(frozen=True, slots=True)
class Job:
    """`work(*arguments)` -> exit status, with its stderr appended to `log`."""

    name: str
    work: Callable[..., int]
    arguments: tuple[Any, ...]
    log: Path


def run(jobs: Sequence[Job], at_once: int, say: Say) -> tuple[dict[str, int], int | None]:
    """Exit status by name of the job, and the signal that stopped the rest (None: all ended by themselves).

    SIGINT and SIGTERM are handed to every process; jobs that have not begun then are left out.
    """
    context = multiprocessing.get_context("spawn")
    waiting, codes = list(jobs), dict[str, int]()
    running: dict[int, tuple[Job, SpawnProcess]] = {}
    caught: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        for _, process in running.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not caught):
            while waiting and len(running) < at_once and not caught:
                job = waiting.pop(0)
                process = context.Process(target=_child, args=(job,))
                process.start()
                running[process.sentinel] = job, process
                say(f"{job.name}: started ({job.log})")
            for sentinel in wait(list(running), timeout=0.5):
                job, process = running.pop(cast(int, sentinel))
                process.join()
                codes[job.name] = process.exitcode or 0
                say(f"{job.name}: {'done' if not process.exitcode else f'exit status {process.exitcode}'}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return codes, caught[0] if caught else None


def note(text: str) -> None:
    """What a job says goes to its log."""
    print(text, file=sys.stderr, flush=True)


def _child(job: Job) -> None:
    os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a") as log:
        os.dup2(log.fileno(), 2)
        try:
            code = job.work(*job.arguments)
        except (ValueError, RuntimeError, OSError) as error:  # one sentence, as without jobs
            note("error: " + " ".join(str(error).split()))
            code = 1
        sys.exit(code)
