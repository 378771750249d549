from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from weftlora.errors import ConfigError
from weftlora.runs.recipe import TrainConfig
from weftlora.train.arguments import OWNED, arguments, check, check_made, save_interval, total_steps


def config(**fields: Any) -> TrainConfig:
    return TrainConfig.parse({"lr": 1e-3, **fields})


def test_an_argument_with_a_key_of_ours_is_sent_there() -> None:
    with pytest.raises(ConfigError, match=r"already set by train\.lr"):
        check(config(args={"learning_rate": 1e-3}))


def test_every_owned_argument_exists() -> None:
    for name in OWNED:
        with pytest.raises(ConfigError, match="already set"):
            check(config(args={name: 1}))


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_an_unknown_argument_names_the_nearest(trainer: str) -> None:
    with pytest.raises(ConfigError, match="did you mean 'adam_beta2'"):
        check(config(trainer=trainer, args={"adam_betta2": 0.9}))


def test_only_sft_takes_sft_arguments() -> None:
    check(config(trainer="sft", args={"packing": False}))
    with pytest.raises(ConfigError, match="packing"):
        check(config(args={"packing": False}))


@pytest.mark.parametrize(
    ("key", "value", "near"), [("schedule", "lineer", "linear"), ("optimizer", "adamw_torh", "adamw_torch")]
)
def test_names_of_transformers_are_checked(key: str, value: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{near}"):
        check(config(**{key: value}))


@pytest.mark.parametrize(
    ("fields", "rows", "processes", "expected"),
    [
        ({"steps": 7}, 1000, 1, 7),
        ({"epochs": 2, "batch_size": 8}, 33, 1, 10),
        ({"epochs": 2, "batch_size": 8, "accumulation": 4}, 33, 1, 4),
        ({"batch_size": 8}, 32, 2, 2),
        ({"epochs": 0.5, "batch_size": 8}, 80, 1, 5),
        ({"epochs": 0.01, "batch_size": 8}, 8, 1, 1),
    ],
)
def test_steps_of_a_run(fields: dict[str, Any], rows: int, processes: int, expected: int) -> None:
    assert total_steps(config(**fields), rows, processes) == expected


def test_a_run_has_about_five_checkpoints_unless_told() -> None:
    assert save_interval(config(), 100) == 20
    assert save_interval(config(), 3) == 1
    assert save_interval(config(save_every=0), 100) == 0
    assert save_interval(config(save_every=7), 100) == 7


def test_arguments_are_quiet_and_write_below_the_run(tmp_path: Path) -> None:
    made = arguments(config(args={"adam_beta2": 0.9}), tmp_path / "checkpoints", 9, validate=True)
    assert made.output_dir == str(tmp_path / "checkpoints")
    assert made.disable_tqdm
    assert made.report_to == []
    assert made.adam_beta2 == 0.9
    assert made.max_steps == 9
    assert not list(tmp_path.iterdir())


def test_sft_does_not_turn_on_checkpointing_by_itself(tmp_path: Path) -> None:
    made = arguments(config(trainer="sft"), tmp_path, 9, validate=False)
    assert not made.activation_checkpointing
    assert not made.gradient_checkpointing


def test_a_value_transformers_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transformers refuses") as raised:
        arguments(config(args={"eval_delay": "soon", "logging_strategy": "sometimes"}), tmp_path, 9, validate=False)
    assert "\n" not in str(raised.value)


def test_an_optimiser_whose_package_is_not_there_is_named_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("You need to install `bitsandbytes`\n  to use it")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", missing)
    made = arguments(TrainConfig(lr=1e-3, optimizer="adamw_bnb_8bit"), tmp_path, 2, False)
    with pytest.raises(
        ConfigError,
        match=r"train\.optimizer=.*adamw_bnb_8bit cannot be made: You need to install `bitsandbytes` to use it$",
    ):
        check_made(made, None)


def test_a_rate_that_nobody_has_decided_is_no_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lr is chosen"):
        arguments(config(lr=None), tmp_path, 5, False)
