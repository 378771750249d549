"""What docs/quantised.md claims of every quantiser is in the record of the run that the table is made from."""

import json
from pathlib import Path

import docs_bench

ROWS = json.loads((docs_bench.BENCH / "quantisers.json").read_text(encoding="utf-8"))["rows"]
TRAINED = {name: row for name, row in ROWS.items() if "loss" in row["train lora"]}
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quantised.md").read_text(encoding="utf-8")


def test_the_quantisers_of_the_extra_and_others_were_executed_without_a_fault() -> None:
    assert {"nf4-double", "int8", "torchao-int8"} <= TRAINED.keys()
    faults = [f"{name}: {key}" for name, row in ROWS.items() for key, cell in row.items() if "fault" in cell]
    assert faults == []


def test_what_was_trained_reloads_resumes_checkpoints_and_exports() -> None:
    for name, row in TRAINED.items():
        for key, cell in row.items():
            assert not key.startswith("train ") or cell["off"] < 1e-3, (name, key)
        assert row["resume"]["same"], name
        assert max(row[f"checkpointing {kind}"]["off"] for kind in ("reentrant", "non_reentrant")) < 1e-3, name
        assert row["export"]["error"] < 1e-5, name
        assert row["merge in memory"].get("back", "refused" in row["merge in memory"]), name
        assert row["rank on original"]["on"] == ["original"], name
        assert row["rank on memory"]["on"] == ["dequantised"], name


def test_a_merge_that_is_quantised_again_loses_most_and_saving_leaves_the_base_alone() -> None:
    for name, row in TRAINED.items():
        if "lost" in (again := row["merge as it is"]):
            assert again["lost"] > row["merge bfloat16"]["lost"], name
        assert row["evaluated"]["weftlora"] < 1e-2, name


def test_the_page_has_the_memory_of_the_record() -> None:
    _, rows = docs_bench.qlora()
    assert all(f"| {' | '.join(row)} |" in PAGE for row in rows)
    assert float(rows[1][2]) < 0.75
