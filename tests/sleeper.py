"""Work for a process of its own, in a module that loads in no time."""

import time
from pathlib import Path


def note(folder: str, seconds: float) -> int:
    if seconds < 0:
        raise ValueError("no such time")
    Path(folder, f"begun-{time.time_ns()}").touch()
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return 130
    return 0
