"""Text that others wrote, made fit for a terminal."""

import unicodedata

from rich.markup import escape

KEPT = "\n\t"
REPLACEMENT = "\ufffd"


def shown(text: str) -> str:
    """`text` with every character that could move a cursor, ring, colour, hide or reorder text replaced by a mark.

    Control characters (also the escape that begins a terminal sequence), marks of direction, line and paragraph
    separators, lone surrogates. The rule is that of `untrusted::shown` in the engine.
    """
    return "".join(REPLACEMENT if _hides(each) else each for each in text)


def plain(text: str) -> str:
    """Text out of a run directory for rich: it commands neither the terminal nor rich."""
    return escape(shown(text))


def _hides(character: str) -> bool:
    if character in KEPT:
        return False
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS


_DIRECTIONS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
