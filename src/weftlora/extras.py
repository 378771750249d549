"""What is installed beside the core, and the one sentence that a call says where its part is missing.

    pip install weftlora              adapt, train in a loop of one's own, save, load, export: torch, peft, transformers, safetensors
    pip install "weftlora[train]"     and what `weftlora.train` imports

An extra is what pyproject.toml says it is; here are the names under which its packages are imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from weftlora.errors import MissingExtraError

_TRAIN = {
    "datasets": "datasets",
    "pydantic": "pydantic",
    "rouge_score": "rouge-score",
    "sacrebleu": "sacrebleu",
    "sklearn": "scikit-learn",
    "trl": "trl",
    "yaml": "pyyaml",
}
EXTRAS: dict[str, dict[str, str]] = {
    "cli": {"pydantic": "pydantic", "rich": "rich", "typer": "typer", "yaml": "pyyaml"},
    "train": _TRAIN,
    "compare": {**_TRAIN, "scipy": "scipy"},
    "auto": {**_TRAIN, "scipy": "scipy", "optuna": "optuna", "jinja2": "jinja2", "vl_convert": "vl-convert-python"},
    "gguf": {"gguf": "gguf"},
    "quant": {"bitsandbytes": "bitsandbytes", "torchao": "torchao"},
    "ray": {"ray": "ray"},
    "report": {
        "jinja2": "jinja2",
        "pydantic": "pydantic",
        "scipy": "scipy",
        "vl_convert": "vl-convert-python",
        "yaml": "pyyaml",
    },
}
"""Extra → the modules its packages are imported as → their distributions."""

PURPOSES = {
    "cli": "the command `weftlora`; with nothing else installed it exports, inspects and measures",
    "train": "recipes: `train`, `evaluate`, `generate`, `suggest_heads`; brings datasets, trl and the libraries of the scores",
    "compare": "`compare`, with all of `train`",
    "auto": "`auto`: the best adapter within a budget; with all of `compare` and `report`, and Optuna",
    "gguf": "models in GGUF files, `smollm2` among them, wherever a model is named",
    "quant": "bases in 4 and 8 bits: `model.load_in_4bit=true` and its kin; not in `all`, since peft then imports them at every start",
    "ray": "`compare --engine ray`: a comparison on a Ray cluster; not in `all`, since it is large",
    "report": "HTML pages: `report`, `inspect --html`",
}
"""Extra → what you can do with it. The tables of the documents and `weftlora doctor` say these."""


def install_line(*extras: str) -> str:
    """The command that installs them."""
    return f'pip install "weftlora[{",".join(extras)}]"'


@contextmanager
def needs(extra: str, what: str, *also: str) -> Iterator[None]:
    """Around imports, or a whole call: `what` is what the user asked for, and a package of `extra` that is not there is named.

    Args:
        extra: what the packages are in.
        what: the call or command.
        also: further extras that the call will need, for the one line that installs all of them.

    Raises:
        MissingExtraError: such a package is not installed. Any other failed import passes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = EXTRAS[extra].get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingExtraError(
            f"{what} needs {package}, which is not installed: {install_line(extra, *also)}"
        ) from None
