"""A quick measurement from end to end: what is in its record."""

import json

import pytest
import torch

from weftlora import ConfigError
from weftlora.bench import StepBench, step
from weftlora.bench.rounds import QUICK

LABELS = [
    "floor",
    *("peft:lora r=8 p=0 fp32", "peft:lora r=16 p=0 fp32", "lora r=8 p=0 fp32", "lora r=16 p=0 fp32"),
    *("hydralora r=8 p=0 fp32", "tied_lora r=16 p=0 fp32", "lora_dash r=8 p=0 fp32"),
    *("alora r=12 p=0 fp32", "flexora r=16 p=0 fp32"),
]


def test_every_structure_and_the_controls_are_there(quick: StepBench):
    assert [str(r.case) for r in quick.cases] == LABELS
    for result in quick.cases:
        assert len(result.seconds) == len(result.seconds_adamw) == quick.setting.rounds == 3
        assert all(0 < a <= b for a, b in zip(result.seconds, result.seconds_adamw, strict=True))
        assert result.ratio.low <= result.ratio.median <= result.ratio.high
    assert quick.exact
    spanned = {"group": 3, "mlp": 3, "linear": 1}
    assert [r.nodes for r in quick.cases] == [{}] * 3 + [spanned] * 7


@pytest.mark.slow
def test_the_table_of_figures_is_measured_with_compiled_blocks():
    found = step(quick=True, table=True, dtypes=["fp32"])
    assert {str(r.case) for r in found.cases} >= {
        "floor compiled",
        "lora r=16 p=0.05 fp32 compiled",
        "lora r=16 p=0.05 fp32 one-mask",
    }
    assert found.exact
    compiled = [r for r in found.cases if r.case.compiled and r.case.is_weft]
    assert [r.exact for r in compiled] == [True, None]
    assert all(set(r.nodes) == {"linear"} for r in compiled)  # nothing spans two linears in a compiled graph
    assert found.record()["command"].startswith("weftlora bench step --all --dtype fp32")


def test_the_floor_is_the_unit(quick: StepBench):
    floor = quick.cases[0]
    assert floor.trained == 0
    assert (floor.ratio.median, floor.ratio_adamw.median, floor.saved_ratio) == (1.0, 1.0, 1.0)


def test_ratios_are_to_the_floor_of_the_same_round(quick: StepBench):
    floor, plain = quick.cases[0], quick.result("fp32", "lora r=16 p=0 fp32")
    ratios = sorted(a / b for a, b in zip(plain.seconds, floor.seconds, strict=True))
    assert plain.ratio.median == ratios[1]


@pytest.mark.parametrize("r", [8, 16])
def test_plain_lora_saves_what_a_count_by_hand_says(quick: StepBench, r: int):
    """Beside the floor: the inputs of q/k/v and of gate/up, and 16 values per linear (8 are padded); attention keeps o's input.
    Less than the floor: of the MLP the gate's and up's outputs, not their activation and product."""
    tokens, hidden, inner = QUICK.batch * QUICK.seq, 64, 192
    extra = quick.result("fp32", f"lora r={r} p=0 fp32").saved_bytes - quick.cases[0].saved_bytes
    assert extra == 4 * tokens * (hidden + hidden - inner + 7 * 16)


def test_every_round_runs_every_case_in_a_new_order():
    order = step(quick=True, dtypes=["fp32"], kinds=["lora"], seed=1).order["fp32"]
    labels = sorted(["floor", *(f"lora r={r} p={p} fp32" for r in (8, 16) for p in ("0", "0.05"))])
    assert [sorted(turn) for turn in order] == [labels] * 3
    assert len({tuple(turn) for turn in order}) > 1


def test_the_record_is_json_and_says_how_to_repeat_it(quick: StepBench):
    record = json.loads(json.dumps(quick.record()))
    assert record["exact"] is True
    assert {"weftlora", "torch", "peft", "transformers", "python", "cpu"} == set(record["versions"])
    assert record["versions"]["cpu"].endswith(("with AMX", "without AMX"))
    assert record["setting"]["threads"] == 1
    assert [row["label"] for row in record["cases"]] == LABELS
    assert record["command"].startswith("weftlora bench step --dtype fp32 --dropout 0.0 --only peft:lora")
    assert record["command"].endswith("--seq 16 --rounds 3 --threads 1 --clock cpu --seed 0")


def test_quick_judges_no_target(quick: StepBench):
    assert quick.targets == []


def test_threads_and_random_state_are_put_back():
    before, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(3)
    try:
        step(quick=True, dtypes=["fp32"], kinds=[])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_reaches_its_total():
    ticks = []
    step(quick=True, dtypes=["fp32"], kinds=["hydralora"], dropouts=[0.0], progress=ticks.append)
    assert [(t.phase, t.done, t.total) for t in ticks][-1] == ("stepping fp32", 6, 6)
    assert [t.done for t in ticks if t.phase == "preparing fp32"] == [1, 2]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"dtypes": ["fp16"]}, "fp16"),
        ({"dropouts": [1.0]}, "below 1"),
        ({"kinds": ["lora_das"]}, "did you mean 'lora_dash'"),
        ({"clock": "sun"}, "sun"),
        ({"threads": 0}, "threads=0"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(setting: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        step(QUICK, **setting)
