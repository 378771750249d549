from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from weftlora.errors import AdapterError, ConfigError, DataError, RunError
from weftlora.runs.run import Run
from weftlora.train import Tick, evaluation

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on rows it can learn by heart, which are its test rows too."""
    folder = tmp_path_factory.mktemp("trained")
    rows = str(tiny.write_rows(folder / "rows.jsonl", tiny.answers(8)))
    return weftlora.train(
        {
            "model": str(bases["llama"]),
            "data": {"train": rows, "test": rows, "validation_fraction": 0},
            "adapter": {"recipe": "hydralora", "r": 8},
            "train": {"steps": 40, "batch_size": 8, "lr": 2e-2, "save_every": 0, "logging_every": 20},
            "out": str(folder / "run"),
        }
    )


def test_a_learned_task_is_matched_exactly_in_every_domain(trained: Run) -> None:
    found = weftlora.evaluate(trained)
    assert found.scores.exact_match == 1.0
    assert found.scores.rows == 8
    assert set(found.domains) == {"a", "b"}
    assert all(scores.exact_match == 1.0 and scores.rows == 4 for scores in found.domains.values())
    assert found.scores.loss < 0.2
    assert found.scores.rouge_l == 100
    assert found.scores.bleu is None  # answers of one word have no four in a row
    kept = json.loads((trained.folder / "eval-test.json").read_text())
    assert kept["scores"]["exact_match"] == 1.0
    assert kept["scores"]["rouge_l"] == 100
    assert list(kept["signatures"]) == ["rouge_l"]
    assert kept["adapter"] == "hydralora"


def test_the_overall_loss_weighs_domains_by_their_tokens(trained: Run) -> None:
    found = weftlora.evaluate(trained, adapter="none")
    a, b = found.domains["a"], found.domains["b"]
    assert found.scores.tokens == a.tokens + b.tokens == 8 * 3
    assert found.scores.loss == pytest.approx((a.loss * a.tokens + b.loss * b.tokens) / 24)


def test_batches_do_not_change_the_scores(trained: Run) -> None:
    one, many = (weftlora.evaluate(trained, adapter="none", batch_size=size).scores for size in (1, 8))
    assert one.loss == pytest.approx(many.loss, rel=1e-5)
    assert one.exact_match == many.exact_match


def test_the_frozen_base_is_worse_and_kept_apart(trained: Run) -> None:
    found = weftlora.evaluate(trained, adapter="none")
    assert found.scores.loss > 1
    assert found.adapter == "none"
    assert (trained.folder / "eval-test-base.json").exists()


def test_a_recipe_can_only_be_measured_without_an_adapter(recipe: Make) -> None:
    found = weftlora.evaluate(recipe(), adapter="none")
    assert found.run is None
    assert found.scores.rows == 12
    with pytest.raises(ConfigError, match="not a run"):
        weftlora.evaluate(recipe())


def test_a_limited_measurement_is_not_kept(trained: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("eval-*"))
    assert weftlora.evaluate(copy, limit=3).scores.rows == 3
    assert not list(Path(copy).glob("eval-*"))


def test_a_classifier_has_accuracy_and_f1(recipe: Make) -> None:
    run = weftlora.train(recipe("bert", adapter="lora", train={"steps": 30}))
    scores = weftlora.evaluate(run).scores
    assert scores.accuracy is not None
    assert scores.macro_f1 is not None
    assert scores.accuracy > 0.6
    assert scores.bleu is None
    assert scores.rouge_l is None
    assert scores.exact_match is None
    again = weftlora.evaluate(run.folder).scores
    assert again == scores
    alone = shutil.copytree(run.adapter_folder, run.folder.parent / "alone")  # it knows its classes by name
    split = "test" if "test" in run.data["counts"] else "validation"
    rows = tiny.write_rows(alone.parent / "again.jsonl", tiny.classified(12))
    one, other = (
        weftlora.evaluate(given, f"data.{split}={rows}", split=split, batch_size=12).scores
        for given in (run.folder, alone)
    )
    assert one == other


SONG = "one two three four five"
ANSWERED = {"ab ->": SONG, "cd ->": "one two", "ef ->": SONG, "gh ->": f"{SONG} six"}


def test_corpus_bleu_is_counted_anew_over_all_domains(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every reference is the song. Domain a: one whole answer, one of two tokens; domain b: whole, and one token too many."""
    rows = [{"prompt": key, "completion": SONG, "domain": "ab"[n // 2]} for n, key in enumerate(ANSWERED)]
    given = recipe()
    given["data"] = {"train": str(tiny.write_rows(tmp_path / "song.jsonl", rows))} | {
        "test": str(tmp_path / "song.jsonl")
    }

    def answers(model: Any, tokenizer: Any, prompts: list[list[int]], *more: Any) -> list[list[int]]:
        asked = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        return [tokenizer(ANSWERED[text], add_special_tokens=False)["input_ids"] for text in asked]

    monkeypatch.setattr(evaluation, "complete", answers)
    found = weftlora.evaluate(given, adapter="none")
    a, b = found.domains["a"], found.domains["b"]
    assert a.bleu == pytest.approx(100 * math.exp(1 - 10 / 7))
    assert b.bleu == pytest.approx(100 * (10 / 11 * 8 / 9 * 6 / 7 * 4 / 5) ** 0.25)
    everything = (17 / 18 * 13 / 14 * 9 / 10 * 6 / 7) ** 0.25 * math.exp(1 - 20 / 18)
    assert found.scores.bleu == pytest.approx(100 * everything)
    assert a.rouge_l == pytest.approx(100 * (1 + 4 / 7) / 2)
    assert b.rouge_l == pytest.approx(100 * (1 + 10 / 11) / 2)
    assert found.scores.rouge_l == pytest.approx((a.rouge_l + b.rouge_l) / 2)
    assert (a.exact_match, b.exact_match, found.scores.exact_match) == (0.5, 0.5, 0.5)
    assert set(found.signatures) == {"bleu", "rouge_l"}


def test_an_encoder_decoder_is_compared_by_its_answers(recipe: Make) -> None:
    run = weftlora.train(recipe("t5", adapter="lora"))
    assert weftlora.evaluate(run).scores.exact_match is not None


def test_a_split_that_is_not_there(trained: Run) -> None:
    with pytest.raises(DataError, match="use --split test"):
        weftlora.evaluate(trained, split="validation")
    with pytest.raises(ConfigError, match="no split 'tset'"):
        weftlora.evaluate(trained, split="tset")


def test_without_test_rows_the_validation_rows_are_measured_and_that_is_said(
    recipe: Make, caplog: pytest.LogCaptureFixture
) -> None:
    given = recipe(adapter="lora")
    del given["data"]["test"]
    run = weftlora.train(given)
    found = weftlora.evaluate(run)
    assert (found.split, found.scores.rows) == ("validation", run.data["counts"]["validation"]["rows"])
    assert (run.folder / "eval-validation.json").is_file()
    assert any("no test rows: these are the validation rows" in record.getMessage() for record in caplog.records)
    with pytest.raises(DataError, match="has no test split: use --split validation"):
        weftlora.evaluate(run, split="test")


def test_progress_covers_loss_and_answers(trained: Run) -> None:
    ticks: list[Tick] = []
    weftlora.evaluate(trained, progress=ticks.append)
    assert {tick.phase for tick in ticks} == {"loss", "answers"}
    assert all(tick.done <= tick.total for tick in ticks)


def test_generation_gives_the_learned_answer_and_stops(trained: Run) -> None:
    answer = weftlora.generate(trained, "ca ->")
    assert (answer.text, answer.finished) == ("cc", True)
    cut = weftlora.generate(trained, "ca ->", max_new_tokens=1)
    assert (cut.text, cut.finished, cut.tokens) == ("c", False, 1)


def test_a_bare_adapter_folder_generates_too(trained: Run) -> None:
    assert weftlora.generate(trained.adapter_folder, "ca ->").text == "cc"


def test_an_adapter_is_measured_on_the_rows_of_its_run_or_on_those_that_are_named(
    trained: Run, bases: dict[str, Path], tmp_path: Path
) -> None:
    rows, whole = f"data.test={trained.recipe['data']['test']}", weftlora.evaluate(trained)
    inside = weftlora.evaluate(trained.adapter_folder)
    assert (inside.run, inside.adapter, inside.scores) == (None, str(trained.adapter_folder), whole.scores)
    alone = shutil.copytree(trained.adapter_folder, tmp_path / "alone")
    before = sorted(path.name for path in alone.iterdir())
    found = weftlora.evaluate(alone, rows)
    assert (found.run, found.split, found.scores, found.domains) == (None, "test", whole.scores, whole.domains)
    frozen = weftlora.evaluate(trained, adapter="none").scores
    assert weftlora.evaluate(alone, rows, adapter="none").scores == frozen != whole.scores
    model = weftlora.evaluate(bases["llama"], rows.replace("test", "validation", 1), "data.validation_limit=3")
    assert (model.adapter, model.split, model.scores.rows) == ("none", "validation", 3)
    assert weftlora.evaluate(bases["llama"], rows).scores == frozen
    assert sorted(path.name for path in alone.iterdir()) == before


def test_an_adapter_without_rows_says_how_to_name_them(trained: Run, tmp_path: Path) -> None:
    alone = shutil.copytree(trained.adapter_folder, tmp_path / "alone")
    with pytest.raises(DataError, match=r"does not say on which rows it is measured: name them with data\.test="):
        weftlora.evaluate(alone)
    with pytest.raises(DataError, match=r"name them with data\.validation="):
        weftlora.evaluate(alone, "data.test=rows.jsonl", split="validation")
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        weftlora.evaluate(alone, "data.test=nowhere.jsonl")
    with pytest.raises(ConfigError, match="would make it another than this adapter"):
        weftlora.evaluate(alone, "train.lr=1")


def test_sampling_is_seeded_and_leaves_the_random_state(trained: Run) -> None:
    import torch

    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [weftlora.generate(trained, "zz", temperature=5.0, seed=seed, max_new_tokens=12).text for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_generation_is_the_bases_own_greedy_search(bases: dict[str, Path], recipe: Make) -> None:
    run = weftlora.train(recipe(adapter="lora", train={"steps": 1, "lr": 1e-9}))
    model = AutoModelForCausalLM.from_pretrained(bases["llama"])
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    ids = tokenizer("ab ->", return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert weftlora.generate(run, "ab ->", max_new_tokens=8).text == tokenizer.decode(
        expected, skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"seed": 2**70}, "is not a seed: use a whole number from 0 to"),
    ],
)
def test_impossible_requests(trained: Run, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        weftlora.generate(trained, "a", **options)


def test_a_base_that_does_not_match_is_refused(trained: Run, tmp_path: Path) -> None:
    retrained = str(tiny.llama(tmp_path / "retrained", seed=1))
    wider = str(tiny.llama(tmp_path / "wider", hidden=48))
    with pytest.raises(AdapterError, match="other weights"):
        weftlora.evaluate(trained, base=retrained)
    with pytest.raises(AdapterError, match="another base"):
        weftlora.generate(trained, "a", base=wider)
    with pytest.raises(AdapterError, match="not made for this base") as raised:
        weftlora.generate(trained.adapter_folder, "a", base=wider)
    assert "\n" not in str(raised.value)


def test_an_adapter_of_a_newer_weft_is_refused(trained: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    path = copy / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99, "weft_version": "9.0"}))
    with pytest.raises(AdapterError, match=r"99.*9\.0"):
        weftlora.evaluate(copy)


def test_a_run_of_a_newer_weft_is_refused(trained: Run, tmp_path: Path) -> None:
    content = json.loads((trained.folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content | {"format": 99}))
    with pytest.raises(RunError, match="newer weftlora"):
        weftlora.evaluate(tmp_path)


def test_tensors_that_peft_would_only_warn_about(trained: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    path = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, path)
    with pytest.raises(AdapterError, match="lacks 1 tensor"):
        weftlora.evaluate(copy)


def test_a_folder_that_is_no_run_and_a_run_without_adapter(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        weftlora.generate(tmp_path, "a")
    copy = shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(AdapterError, match="--resume"):
        weftlora.evaluate(copy)
