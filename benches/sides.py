"""The two sides as processes: `moe-lab bench`, and PyTorch, warm between rounds, killed where it outgrows memory."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
BINARY = HERE.parent / "target" / "release" / "moe-lab"


class TooLargeError(Exception):
    """The peer wanted more memory than it may have."""


class UnfinishedError(Exception):
    """The peer failed or was not ready in time; the message says which."""


def ours(case_flags: Sequence[str], dtype: str, threads: int, seconds: float, peak: bool = False) -> dict:
    """One report of `moe-lab bench`."""
    command = [str(BINARY), "bench", *case_flags, f"--dtype={dtype}", f"--threads={threads}"]
    command += [f"--seconds={seconds}", "--json"]
    done = subprocess.run([*command, *["--no-peak"] * (not peak)], capture_output=True, text=True)
    if done.returncode:
        raise UnfinishedError(done.stderr.strip())
    return json.loads(done.stdout.splitlines()[-1])


class Peer:
    """A PyTorch process that does steps when it is told to."""

    def __init__(self, flags: Sequence[str], threads: int, limit: int, patience: float, warm: int = 3) -> None:
        command = [sys.executable, str(HERE / "torch_peer.py"), *flags, f"--threads={threads}", f"--warm={warm}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.limit, self.reason = limit, ""
        self.errors: list[str] = []
        self.deadline = time.monotonic() + patience
        threading.Thread(target=self._watch, daemon=True).start()
        threading.Thread(target=lambda: self.errors.extend(self.process.stderr or ()), daemon=True).start()
        self.ready = self._answer()
        self.deadline = float("inf")

    def measure(self, seconds: float, patience: float = 120) -> dict:
        assert self.process.stdin
        self.deadline = time.monotonic() + patience
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        answer = self._answer()
        self.deadline = float("inf")
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        code = self.process.wait()
        if (
            self.reason == "memory"
            or any("not enough memory" in line for line in self.errors)
            or (code == -9 and not self.reason)
        ):
            raise TooLargeError(f"more than {self.limit / 2**30:.0f} GiB")
        raise UnfinishedError(self.reason or (self.errors[-1].strip() if self.errors else f"exit status {code}"))

    def _watch(self) -> None:
        try:
            process = psutil.Process(self.process.pid)
            while self.process.poll() is None:
                children = process.children(recursive=True)
                if process.memory_info().rss + sum(child.memory_info().rss for child in children) > self.limit:
                    self.reason = "memory"
                elif time.monotonic() > self.deadline:
                    self.reason = "not ready in time"
                if self.reason:
                    for child in children:
                        child.kill()
                    self.process.kill()
                time.sleep(0.05)
        except psutil.Error:
            pass
