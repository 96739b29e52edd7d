"""Ways to class the tokens of a text: by form, by place, by what they do in a dialogue, by place in the sentence."""

from collections.abc import Callable, Sequence

WORDS = """
a an the this that these those and or but nor so yet if because as than when while where why how what who which
of in on at by for with from to into out up down over under about between through is are was were be been being am
do does did has have had can could will would shall should may might must not no it its he she they we you i him
her them us me my your his our their there here all each every some any more most many much very too also
"""
FUNCTION_WORDS = frozenset(WORDS.split())
ENDS = (".", "?", "!")
PLACES = ((1, "1"), (2, "2"), (4, "3-4"), (8, "5-8"), (16, "9-16"), (32, "17-32"))


def class_of(token: str, position: int) -> str:
    """The class of a token by its form; `position` 0 begins a text."""
    if token.startswith("<") and token.endswith(">"):
        return "special"
    if token in ("User", "Assistant"):
        return "role"
    if not any(letter.isalnum() for letter in token):
        return "punctuation"
    if any(letter.isdigit() for letter in token):
        return "digit"
    if token.lower() in FUNCTION_WORDS:
        return "function word"
    return "name" if token[0].isupper() and position else "content word"


def forms(tokens: Sequence[str]) -> list[str]:
    return [class_of(token, position) for position, token in enumerate(tokens)]


def places(tokens: Sequence[str]) -> list[str]:
    """The place in the text, in ranges that double."""
    return [next((name for end, name in PLACES if place <= end), "33-") for place in range(1, len(tokens) + 1)]


def parts(tokens: Sequence[str]) -> list[str]:
    """Question, answer or statement; the words that mark them are marks."""
    found, part = [], "statement"
    for token in tokens:
        part = {"User": "question", "Assistant": "answer"}.get(token, part)
        mark = token in ("User", "Assistant") or class_of(token, 0) == "special"
        found.append("mark" if mark else part)
    return found


def sentences(tokens: Sequence[str]) -> list[str]:
    """The first word of a sentence, its end mark, what lies between, and what belongs to no sentence."""
    found, begins = [], True
    for token in tokens:
        if token in ENDS:
            found.append("end")
        elif token in ("User", "Assistant", ":") or class_of(token, 0) == "special":
            found.append("none")
        else:
            found.append("first" if begins else "inside")
            begins = False
            continue
        begins = True
    return found


VIEWS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "form": forms,
    "place": places,
    "part": parts,
    "sentence": sentences,
}
