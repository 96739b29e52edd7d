"""Our training step under the torch engine and PyTorch's own, on one device. `make bench-gpu` runs it.

    gpu.py                          small and medium, then contexts of 8k to 32k tokens: eager, compiled, bf16
    gpu.py --cases medium           some cases; --eager, --dtypes bf16: some variants
    gpu.py --pack FOLDER            what has to be carried to a machine with a GPU and without a compiler
    gpu.py --device cpu --cases seed --eager --seconds 0.2 --rounds 1
                                    the same program without a GPU: shows that it works, its numbers are not for a GPU

Rounds of both sides alternate. A ratio is ours / PyTorch in tokens per second, the best round of each side; its spread
is that of rounds next to each other. Memory is what the device gave out at the peak, above what it held before, read
from nvidia-smi for both sides. The share of peak is that of matrix products: their FLOPs (forward and backward, from
the shapes and the experts really active) over time and over the rate of one 8192³ product measured here.
Needs torch and nothing else: it runs where no package can be installed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from cases import DENSE_SMALL, MEDIUM, SEED, SMALL, Case, Variant, variants

HERE = Path(__file__).resolve().parent
LONG = [replace(SMALL, name=f"small, {t // 1024}k context", seq=t, batch=1) for t in (8192, 16384, 32768)]
LONG += [replace(DENSE_SMALL, name=f"small dense RoPE, {t // 1024}k context", seq=t, batch=1) for t in (8192, 32768)]
CASES = {case.name: case for case in (SEED, SMALL, DENSE_SMALL, MEDIUM, *LONG)}
ELSEWHERE = """no CUDA device here. To measure on a machine that has one (the same torch 2.11.0, no compiler needed):
  make build-torch && .venv/bin/python benches/gpu.py --pack gpu    here: folder gpu with binaries, scripts and wheel
  python3 gpu/benches/gpu.py --out gpu.json                         there, with the Python whose torch is to be used
The libraries are found through that torch. Whether this program works at all can be seen here:
  .venv/bin/python benches/gpu.py --device cpu --cases seed --eager --seconds 0.2 --rounds 1"""


class FailedError(Exception):
    """A side did not finish; the message says why."""


class Memory:
    """The most memory that the device gave out while this is open, bytes; none where nvidia-smi does not say."""

    def __init__(self, device: str) -> None:
        self.index = None if device == "cpu" else device.partition(":")[2] or "0"
        self.before, self.open = self.now(), True
        self.peak = self.before
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def now(self) -> int | None:
        if self.index is None or not shutil.which("nvidia-smi"):
            return None
        command = ["nvidia-smi", f"--id={self.index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return int(found) * 2**20 if found.isdigit() else None

    def watch(self) -> None:
        while self.open and self.peak is not None:
            self.peak = max(self.peak, self.now() or 0)
            time.sleep(0.1)

    def close(self) -> int | None:
        self.open = False
        self.thread.join()
        return None if self.peak is None or self.before is None else self.peak - self.before


def ours(binary: Path, case: Case, bf16: bool, options: argparse.Namespace) -> dict:
    """One report of `moe-lab bench`, with the memory of the device."""
    flags = ['--set=engine="torch"', f'--set=device="{options.device}"', f"--dtype={'bf16' if bf16 else 'f32'}"]
    flags += [f"--threads={options.threads}", f"--seconds={options.seconds}", "--no-peak", "--json"]
    memory = Memory(options.device)
    done = subprocess.run([str(binary), "bench", *case.ours(), *flags], capture_output=True, text=True)
    used = memory.close()
    if done.returncode:
        raise FailedError(done.stderr.strip().splitlines()[-1] if done.stderr else f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1]) | {"device_memory_bytes": used}


class Peer:
    """PyTorch's side, a process that stays warm between rounds."""

    def __init__(self, case: Case, kind: Variant, options: argparse.Namespace) -> None:
        flags = [*case.torch(), *kind.flags(), f"--device={options.device}", f"--threads={options.threads}"]
        self.memory = Memory(options.device)
        command = [sys.executable, str(HERE / "torch_peer.py"), *flags]
        self.process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)
        self.patience = threading.Timer(options.patience, self.process.kill)
        self.patience.start()
        self.ready = self.answer()
        self.patience.cancel()

    def answer(self) -> dict:
        assert self.process.stdout
        assert self.process.stderr
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        errors = self.process.stderr.read()
        self.close()
        if "out of memory" in errors:
            raise FailedError("out of memory")
        raise FailedError(errors.strip().splitlines()[-1][:200] if errors.strip() else "not ready in time")

    def measure(self, seconds: float) -> dict:
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> int | None:
        self.patience.cancel()
        self.process.kill()
        self.process.wait()
        return self.memory.close()


def compare(binary: Path, case: Case, options: argparse.Namespace) -> dict:
    """Both dtypes of ours beside every variant of PyTorch."""
    result: dict = {"case": case.__dict__, "ours": {}, "torch": []}
    for bf16 in [name == "bf16" for name in options.dtypes]:
        name = "bf16" if bf16 else "f32"
        try:
            mine = [ours(binary, case, bf16, options)]
        except FailedError as error:
            result["ours"][name] = {"note": str(error)}
            continue
        for kind in [kind for kind in variants(case, not options.eager) if kind.bf16 == bf16]:
            row: dict = {"variant": kind.name}
            result["torch"].append(row)
            try:
                peer = Peer(case, kind, options)
                pairs = []
                for _ in range(options.rounds):
                    theirs = peer.measure(options.seconds)
                    mine.append(ours(binary, case, bf16, options))
                    pairs.append((mine[-1]["tokens_per_second"], theirs["tokens_per_second"]))
                used = peer.close()
            except FailedError as error:
                row["note"] = str(error)
                continue
            ratios = sorted(a / b for a, b in pairs)
            best = [max(pair[side] for pair in pairs) for side in (0, 1)]
            row |= {"tokens_per_second": best[1], "ratio": best[0] / best[1], "spread": [ratios[0], ratios[-1]]}
            row |= {"device_memory_bytes": used, "warm_seconds": peer.ready["warm_seconds"]}
        report = max(mine, key=lambda report: report["tokens_per_second"])
        report["share_of_peak"] = 1e9 * report["matmul_gflops"] / options.peaks[name]
        result["ours"][name] = report
    done = [row for row in result["torch"] if "ratio" in row]
    rates = [report["tokens_per_second"] for report in result["ours"].values() if "tokens_per_second" in report]
    if done and rates:
        fastest = max(done, key=lambda row: row["tokens_per_second"])
        result["fastest"] = {"variant": fastest["variant"], "ratio": max(rates) / fastest["tokens_per_second"]}
    return result


def rate_of_products(device: str, bf16: bool) -> float:
    """FLOP/s of the best of some 8192³ products (1024³ on a CPU)."""
    import torch

    size, kind = (1024 if device == "cpu" else 8192), (torch.bfloat16 if bf16 else torch.float32)
    a, b = (torch.randn(size, size, device=device).to(kind) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def table(results: list[dict]) -> str:
    """The results as a table in markdown."""

    def line(case: str, side: str, row: dict, last: str) -> str:
        if "tokens_per_second" not in row:
            return f"| {case} | {side} | {row.get('note', '')} | | |"
        used = row.get("device_memory_bytes")
        memory = f"{used / 2**30:.1f}" if used is not None else "?"
        return f"| {case} | {side} | {row['tokens_per_second']:,.0f} | {memory} | {last} |"

    lines = ["| case | | tokens/s | memory, GiB | |", "|---|---|---|---|---|"]
    for result in results:
        name = result["case"]["name"]
        for dtype, row in result["ours"].items():
            lines.append(line(name, f"moe_lab {dtype}", row, f"{100 * row.get('share_of_peak', 0):.1f} % of peak"))
        for row in result["torch"]:
            spread = "{:.2f}-{:.2f}".format(*row["spread"]) if "spread" in row else ""
            lines.append(line(name, f"PyTorch {row['variant']}", row, f"ours {row.get('ratio', 0):.2f}x ({spread})"))
    return "\n".join(lines)


def binary() -> Path:
    """moe-lab with the torch engine: carried along, or built here."""
    places = [HERE.parent / "bin" / "moe-lab", HERE.parent / ".venv" / "bin" / "moe-lab"]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        sys.exit(f"error: {places[-1]} is missing: make build-torch")
    return found


def pack(folder: Path) -> None:
    """Binary with its launcher, these scripts and the wheels of dist/, as they lie here."""
    source = binary().parent
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "benches").mkdir(exist_ok=True)
    for name in ("moe-lab", "moe-lab-torch"):
        shutil.copy2(source / name, folder / "bin" / name)
    for name in ("gpu.py", "cases.py", "torch_peer.py"):
        shutil.copy2(HERE / name, folder / "benches" / name)
    wheels = sorted((HERE.parent / "dist").glob("*.whl"))
    for wheel in wheels:
        shutil.copy2(wheel, folder / wheel.name)
    print(f"{folder}: binary, scripts and {len(wheels)} wheel(s); there: python3 {folder.name}/benches/gpu.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="*", choices=["f32", "bf16"], default=["f32", "bf16"])
    parser.add_argument("--eager", action="store_true", help="leave out what PyTorch compiles")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=240.0, help="seconds that a variant may take to be warm")
    parser.add_argument("--pack", type=Path, help="make this folder, to be carried to another machine")
    parser.add_argument("--out", type=Path, help="JSON file (benches/results/<device>.json)")
    options = parser.parse_args()
    if options.pack:
        pack(options.pack)
        return
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        sys.exit(f"error: {ELSEWHERE}")
    name = "cpu rehearsal" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    options.peaks = {"f32": rate_of_products(options.device, False), "bf16": rate_of_products(options.device, True)}
    chosen = [CASES[case] for case in options.cases] if options.cases else [SMALL, DENSE_SMALL, MEDIUM, *LONG]
    path = options.out or HERE / "results" / f"{name.lower().replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for case in chosen:
        results.append(compare(binary(), case, options))
        print(table(results[-1:]), flush=True)
        found = {"device": name, "torch": torch.__version__, "peak_flops": options.peaks, "results": results}
        path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{name}, torch {torch.__version__}; written: {path}\n\n{table(results)}")


if __name__ == "__main__":
    main()
