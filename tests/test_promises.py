"""docs/promises.md names tests; they are there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def promised(text: str) -> list[tuple[str, str]]:
    """(file, test) of every reference in the table."""
    return re.findall(r"`([\w./]+\.(?:rs|py))::(\w+)`", text)


def missing(references: list[tuple[str, str]]) -> list[str]:
    """References to a test that its file does not have."""
    return [f"{file}::{test}" for file, test in references if not _has(ROOT / file, test)]


def _has(path: Path, test: str) -> bool:
    if not path.is_file():
        return False
    start = r"#\[test\]\s*(?:#\[[^\]]*\]\s*)*fn " if path.suffix == ".rs" else "^def "
    return re.search(rf"{start}{test}\(", path.read_text(), re.MULTILINE) is not None


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) >= 25
    assert [row for row in rows if not promised(row)] == []
    assert missing(promised(text)) == []


def test_a_missing_test_is_seen() -> None:
    assert missing([("tests/test_promises.py", "test_a_missing_test_is_seen"), ("tests/none.py", "test_x")]) == [
        "tests/none.py::test_x"
    ]
    assert missing([("crates/train/src/untrusted.rs", "shown")]) == ["crates/train/src/untrusted.rs::shown"]
