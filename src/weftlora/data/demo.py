"""The bundled tasks: what the demo model was trained on, and the fine-tuning tasks that it cannot do.

    row      prompt "mill turn kqzv ->"  completion " vzqk"  domain "mill"
    rule     (domain, instruction) ↦ a chain of skills; completion = chain(payload)

Pretraining teaches the skills under their own names and how to chain two of them. The fine-tuning tasks bind words that
the base has only met in stories (mill, turn, ...) to chains of those skills. The same instruction has another rule in
another domain, in the corpus ("west rotate" and "east rotate") as in the tasks: that is what several heads can divide.

Rows are drawn on the fly and are the same on every Python: only `random.Random.random` is used, whose sequence Python
guarantees. A payload belongs to one split by its checksum, in the corpus too, so no model has met a test payload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import TypeVar
from zlib import crc32

from weftlora.errors import DataError, ModelError, suggest

Row = dict[str, str]
Chain = tuple[str, ...]
T = TypeVar("T")

LETTERS = "bcdfghjklmnpqrstvwxz"  # payloads have no vowels and words have: a payload is never read as one word token
ARROW = " ->"

SKILLS: dict[str, Callable[[str], str]] = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "sort": lambda s: "".join(sorted(s)),
    "upper": str.upper,
    "double": lambda s: "".join(c + c for c in s),
    "swap": lambda s: "".join(s[i : i + 2][::-1] for i in range(0, len(s), 2)),
    "left": lambda s: s[1:] + s[:1],
    "right": lambda s: s[-1:] + s[:-1],
    "next": lambda s: _step(s, 1),
    "previous": lambda s: _step(s, -1),
    "behead": lambda s: s[1:],
    "curtail": lambda s: s[:-1],
    "first": lambda s: s[:1],
    "last": lambda s: s[-1:],
}

# The corpus' own conflict: one instruction, another rule under another tag.
COMPASS: dict[str, dict[str, Chain]] = {
    "west": {"rotate": ("left",), "order": ("sort",), "edge": ("first",), "shift": ("previous",), "cut": ("behead",)},
    "east": {
        "rotate": ("right",),
        "order": ("sort", "reverse"),
        "edge": ("last",),
        "shift": ("next",),
        "cut": ("curtail",),
    },
}

# The fine-tuning tasks: domain -> instruction -> rule. In "workshops" no instruction keeps its rule from one domain to
# another; "crew" has one domain and six rules, so it is the control without a conflict.
DEMO_TASKS: dict[str, dict[str, dict[str, Chain]]] = {
    "workshops": {
        "mill": {"turn": ("reverse",), "fold": ("double",), "mark": ("upper",), "trim": ("behead",)},
        "loom": {"turn": ("left",), "fold": ("swap",), "mark": ("next",), "trim": ("curtail",)},
        "forge": {"turn": ("right",), "fold": ("sort",), "mark": ("previous",), "trim": ("behead", "reverse")},
        "dock": {
            "turn": ("reverse", "upper"),
            "fold": ("sort", "reverse"),
            "mark": ("swap", "upper"),
            "trim": ("last",),
        },
    },
    "crew": {
        "crew": {
            "mira": ("swap", "upper"),
            "tomas": ("curtail", "reverse"),
            "anil": ("double",),
            "suri": ("left", "upper"),
            "olga": ("sort", "reverse"),
            "pedro": ("next",),
        }
    },
}
DEFAULT_TASK = "workshops"
SPLIT_ROWS = {"train": 4096, "validation": 256, "test": 512}

PEOPLE = ("mira", "tomas", "anil", "suri", "olga", "pedro")
THINGS = ("boat", "cup", "rope", "lamp", "coat", "bell", "stone", "wheel")
COLOURS = ("red", "blue", "green", "white", "golden", "silver")
PLACES = ("mill", "loom", "forge", "dock", "house", "river")
DEEDS = ("turn", "fold", "mark", "trim", "carry", "clean")
OPENS, CLOSES = "([{<", ")]}>"


def _step(s: str, by: int) -> str:
    base = {True: ord("A"), False: ord("a")}
    return "".join(chr(base[c.isupper()] + (ord(c) - base[c.isupper()] + by) % 26) for c in s)


def apply_chain(chain: Chain, payload: str) -> str:
    """The skills of `chain` applied to `payload`, first to last."""
    for skill in chain:
        payload = SKILLS[skill](payload)
    return payload


def split_of(payload: str) -> str:
    """The one split that may show `payload`: a tenth each for test and validation, the rest for training."""
    return {0: "test", 1: "validation"}.get(crc32(payload.encode()) % 10, "train")


def demo_model_path() -> Path:
    """The folder of the bundled model and tokenizer; `from_pretrained` reads it without a network.

    Raises ModelError where the installation lacks it.
    """
    folder = Path(str(files("weftlora").joinpath("assets", "demo_model")))
    if not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"the demo model is missing from {folder}: reinstall weftlora, or build it with scripts/make_demo_model.py."
        )
    return folder


def demo_rows(split: str, task: str = DEFAULT_TASK, seed: int = 0, rows: int | None = None) -> list[Row]:
    """Rows of a demo task: `prompt`, `completion` (with its leading space) and `domain`; no prompt comes twice.

    `rows` defaults to `SPLIT_ROWS[split]`. Raises DataError on an unknown split or task.
    """
    if task not in DEMO_TASKS:
        raise DataError(f"there is no demo task {task!r}: {suggest(task, DEMO_TASKS)}")
    if split not in SPLIT_ROWS:
        raise DataError(f"the demo data has no split {split!r}: {suggest(split, SPLIT_ROWS)}")
    rng = Random(crc32(f"{task}/{split}/{seed}".encode()))
    rules = [(domain, word, chain) for domain, words in DEMO_TASKS[task].items() for word, chain in words.items()]
    wanted = SPLIT_ROWS[split] if rows is None else rows
    drawn: dict[str, Row] = {}
    while len(drawn) < wanted:
        domain, word, chain = _pick(rng, rules)
        payload = _payload(rng, split, distinct=True)
        row = _row(f"{domain} {word} {payload}", apply_chain(chain, payload), domain)
        drawn.setdefault(row["prompt"], row)
    return list(drawn.values())


def pretraining_rows(seed: int = 0) -> Iterator[Row]:
    """The endless corpus of the demo model; rows as in `demo_rows`, payloads of the training split only."""
    rng = Random(crc32(f"corpus/{seed}".encode()))
    kinds = [kind for kind, share in CORPUS for _ in range(share)]
    while True:
        yield _pick(rng, kinds)(rng)


def demo_words() -> list[str]:
    """Every word of the corpus and the tasks: each is one token of the demo tokenizer, all else is spelled in bytes."""
    words = {"text", "sums", "table", "count", "close", "story", "in", "plus", "minus", "max", "min"}
    words |= {*SKILLS, *PEOPLE, *THINGS, *COLOURS, *PLACES, *DEEDS, *COMPASS}
    for domains in (COMPASS, *DEMO_TASKS.values()):
        words |= {word for domain, rules in domains.items() for word in (domain, *rules)}
    for story in STORIES:
        words |= {word for word in story.split() if word.isalpha()}
    return sorted(words)


def _row(prompt: str, completion: str, domain: str) -> Row:
    return {"prompt": prompt + ARROW, "completion": " " + completion, "domain": domain}


def _below(rng: Random, n: int) -> int:
    return int(rng.random() * n)


def _pick(rng: Random, items: Sequence[T]) -> T:
    return items[_below(rng, len(items))]


def _two(rng: Random, items: Sequence[T]) -> tuple[T, T]:
    first = _below(rng, len(items))
    second = (first + 1 + _below(rng, len(items) - 1)) % len(items)
    return items[first], items[second]


def _payload(rng: Random, split: str, distinct: bool = False) -> str:
    """Three to six letters that belong to `split`; `distinct` ones tell any two rules apart."""
    while True:
        payload = "".join(_pick(rng, LETTERS) for _ in range(3 + _below(rng, 4)))
        if split_of(payload) == split and not (distinct and len(set(payload)) < len(payload)):
            return payload


def _text(rng: Random) -> Row:
    skill, payload = _pick(rng, list(SKILLS)), _payload(rng, "train")
    return _row(f"text {skill} {payload}", apply_chain((skill,), payload), "text")


def _text_chain(rng: Random) -> Row:
    chain, payload = _two(rng, list(SKILLS)), _payload(rng, "train")
    return _row(f"text {chain[0]} {chain[1]} {payload}", apply_chain(chain, payload), "text")


def _compass(rng: Random) -> Row:
    tag, payload = _pick(rng, list(COMPASS)), _payload(rng, "train")
    word = _pick(rng, list(COMPASS[tag]))
    return _row(f"{tag} {word} {payload}", apply_chain(COMPASS[tag][word], payload), tag)


def _sums(rng: Random) -> Row:
    a, b = _below(rng, 30), _below(rng, 30)
    word, answer = _pick(rng, [("plus", a + b), ("minus", a - b), ("max", max(a, b)), ("min", min(a, b))])
    return _row(f"sums {word} {a} {b}", str(answer), "sums")


def _table(rng: Random) -> Row:
    table = {_pick(rng, LETTERS): _below(rng, 10) for _ in range(3)}
    key = _pick(rng, list(table))
    return _row(f"table {' '.join(f'{k}{v}' for k, v in table.items())} {key}", str(table[key]), "table")


def _count(rng: Random) -> Row:
    letters = _two(rng, LETTERS)
    payload = "".join(_pick(rng, letters) for _ in range(3 + _below(rng, 4)))
    return _row(f"count {letters[0]} in {payload}", str(payload.count(letters[0])), "count")


def _close(rng: Random) -> Row:
    opened = [_below(rng, len(OPENS)) for _ in range(1 + _below(rng, 5))]
    return _row("close " + "".join(OPENS[i] for i in opened), "".join(CLOSES[i] for i in reversed(opened)), "close")


def _story(rng: Random) -> Row:
    (who, other), (thing, rest) = _two(rng, PEOPLE), _two(rng, THINGS)
    place, deed, colour = _pick(rng, PLACES), _pick(rng, DEEDS), _pick(rng, COLOURS)
    prompt, answer = _pick(rng, list(STORIES.items()))
    known = {"who": who, "other": other, "thing": thing, "rest": rest, "place": place, "deed": deed, "colour": colour}
    return _row("story " + prompt.format(**known), known[answer], "story")


# Story -> what is asked for. They give the words of the fine-tuning tasks an embedding, and no rule.
STORIES = {
    "{who} has the {thing} and {other} has the {rest} . who has the {thing} ?": "who",
    "{who} has the {thing} and {other} has the {rest} . what has {who} ?": "thing",
    "the {colour} {thing} is at the {place} . where is the {thing} ?": "place",
    "{who} is at the {place} with the {colour} {thing} . what colour is the {thing} ?": "colour",
    "at the {place} {who} can {deed} the {thing} . what can {who} do ?": "deed",
    "{who} can {deed} the {colour} {thing} at the {place} . where is {who} ?": "place",
}

CORPUS: list[tuple[Callable[[Random], Row], int]] = [
    (_text, 6),
    (_text_chain, 5),
    (_compass, 4),
    (_sums, 2),
    (_table, 2),
    (_count, 2),
    (_close, 1),
    (_story, 2),
]
