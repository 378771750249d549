"""Secrets by their name, by their form and from the environment; and what only looks like one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import SFTConfig

from weftlora.redaction import MASK, is_secret_name, redacted, secrets_in

TOKEN = "hf_" + "abcdEFGH1234" * 3


@pytest.mark.parametrize(
    "name",
    [
        *("hub_token", "HF_TOKEN", "token", "use_auth_token", "WANDB_API_KEY", "apiKey", "AWS_SECRET_ACCESS_KEY"),
        *("DB_PASSWORD", "client_secret", "private_key", "OPENAI_API_KEY", "auth-token", "GITHUB_TOKEN", "password"),
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["eos_token", "tokens", "num_input_tokens_seen", "seed", "keep", "key", "keys", "pad_token"]
)
def test_what_only_sounds_like_one_is_none(name: str) -> None:
    assert not is_secret_name(name)


def test_of_the_arguments_of_a_trainer_only_the_hubs_token_is_one() -> None:
    names = {field.name for kind in (TrainingArguments, SFTConfig) for field in dataclasses.fields(kind)}
    assert {name for name in names if is_secret_name(name)} == {"hub_token"}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (f"the model {TOKEN} is not there", f"the model {MASK} is not there"),
        ("https://me:pass@host/x.git", f"https://{MASK}@host/x.git"),
        ("https://pass@host/x", f"https://{MASK}@host/x"),
        ("https://host/x?a=1&token=abc&b=2", f"https://host/x?a=1&token={MASK}&b=2"),
        ("s3://b/k?X-Amz-Signature=abc", f"s3://b/k?X-Amz-Signature={MASK}"),
        ("sk-" + "a" * 40, MASK),
        ("AKIA" + "A" * 16, MASK),
        ("me@example.org and https://host/a@b", "me@example.org and https://host/a@b"),
        ("an hf_hub folder, sk-learn", "an hf_hub folder, sk-learn"),
    ],
)
def test_a_secret_is_known_by_its_form(text: str, left: str) -> None:
    assert redacted(text) == left


def test_the_value_of_a_secret_variable_is_masked_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("DB_PASSWORD", "short")
    monkeypatch.setenv("ORDINARY", "nothing-secret")
    monkeypatch.setenv("PWD", "/home/me/project")  # the shell's own, and no password
    monkeypatch.setenv("OLDPWD", "project-of-mine")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    plain = ["/home/me/project/rows.jsonl", "project-of-mine", "/home/me/key.json"]
    assert redacted(plain) == plain
    found: Any = redacted({"a": ["x/0123456789abcdef/y", "short", "nothing-secret"], "0123456789abcdef": 1})
    assert found == {"a": [f"x/{MASK}/y", "short", "nothing-secret"], MASK: 1}


def test_settings_are_named_and_not_shown() -> None:
    given = {
        "hub_token": "x",
        "model_init_kwargs": {"token": "y", "seed": 3},
        "a": [{"password": "z"}],
        "push_to_hub": True,
    }
    assert list(secrets_in(given, "train.args")) == [
        "train.args.hub_token",
        "train.args.model_init_kwargs.token",
        "train.args.a.password",
    ]
    assert redacted(given)["hub_token"] == MASK
    assert redacted({"hub_token": None, "use_auth_token": True}) == {"hub_token": None, "use_auth_token": True}
    assert list(secrets_in({"hub_model_id": TOKEN}, "train.args")) == ["train.args.hub_model_id"]


def test_a_secret_that_is_set_or_taken_away_later_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert redacted("0123456789abcdef") == "0123456789abcdef"
    monkeypatch.setenv("SOME_TOKEN", "0123456789abcdef")
    assert redacted("x 0123456789abcdef") == f"x {MASK}"
    monkeypatch.setenv("SOME_TOKEN", "fedcba9876543210")
    assert redacted("0123456789abcdef fedcba9876543210") == f"0123456789abcdef {MASK}"
    monkeypatch.delenv("SOME_TOKEN")
    assert redacted("fedcba9876543210") == "fedcba9876543210"


def test_what_is_redacted_stays_as_it_is_when_it_is_redacted_again() -> None:
    for value in ({"c?token=a": "x"}, {"https://u:p@h/?key=abc": ["x?sig=y"]}, {"hub_token": "x"}):
        assert redacted(redacted(value)) == redacted(value)
