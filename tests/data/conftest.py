"""A tokenizer with one token a letter, so that every mask below can be counted by hand, and the real data."""

from __future__ import annotations

import os
import string
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>"]


def _letters(prefix: bool = True, suffix: bool = False, **kwargs: object) -> PreTrainedTokenizerFast:
    """Token ids: 0 <s>, 1 </s>, 2 <pad>, 3 <unk>, then one per printable character."""
    vocab = {token: number for number, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    single = ("<s> " if prefix else "") + "$A" + (" </s>" if suffix else "")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    kwargs = {"bos_token": "<s>", "eos_token": "</s>", **kwargs}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", **kwargs)


@pytest.fixture(scope="session")
def letters() -> PreTrainedTokenizerFast:
    """BOS before a text, as a Llama."""
    return _letters()


@pytest.fixture(scope="session")
def bare_letters() -> PreTrainedTokenizerFast:
    """Nothing around a text, as GPT-2."""
    return _letters(prefix=False)


@pytest.fixture(scope="session")
def framed_letters() -> PreTrainedTokenizerFast:
    """A token before and one after a text, as BERT and T5."""
    return _letters(suffix=True)


@pytest.fixture(scope="session")
def chat_letters() -> PreTrainedTokenizerFast:
    tokenizer = _letters()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def endless_letters() -> PreTrainedTokenizerFast:
    """No end-of-text token."""
    return _letters(eos_token=None)


@pytest.fixture(scope="session")
def ids(letters):
    """The token numbers of a text, one a letter."""
    return lambda text: letters(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of the real models and data."""
    folder = os.environ.get("WEFT_DATA")
    if folder and Path(folder, "tasks").is_dir():
        return Path(folder)
    if os.environ.get("CI") == "true":
        raise RuntimeError("CI must set WEFT_DATA to the folder of the real models and data.")
    pytest.skip("WEFT_DATA does not name the folder of the real models and data")


@pytest.fixture(scope="session")
def stories(real):
    """The tokenizer of the real decoder."""
    return AutoTokenizer.from_pretrained(real / "models" / "stories260k")
