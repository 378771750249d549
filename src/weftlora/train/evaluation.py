"""How good is a run on held-out rows, and what it answers: scores overall and per domain, and generated text.

Text is greedy or sampled, in batches, with the KV cache. What is scored over all rows is counted again from everything that was
predicted, since BLEU and F1 are no means over domains.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from weftlora.data import IGNORE, Collator, generation_prompts
from weftlora.data import load as load_data
from weftlora.data.examples import tools_of
from weftlora.data.paths import is_model
from weftlora.disk.files import write_json
from weftlora.disk.lock import holding
from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.progress import Progress, Tick
from weftlora.records import Record
from weftlora.runs import base_model
from weftlora.runs.load import Trained, load_adapter, load_base, load_model, load_run, recipe_of
from weftlora.runs.recipe import Recipe, builtin
from weftlora.runs.run import Run
from weftlora.runs.scores import Measured, accuracy, bleu, evaluating, exact_match, macro_f1, mean_loss, rouge_l
from weftlora.settings import check_seed
from weftlora.train import prepare as preparing
from weftlora.train.prompting import Message, Prompt, Prompting, prompt_ids, stop_at_turns

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation(Record):
    """One answer. `finished` is False where `max_new_tokens` cut it off."""

    prompt: str | list[Message] | dict[str, Any]
    text: str
    tokens: int
    finished: bool
    seconds: float
    tokens_per_s: float
    given: str = ""
    """What the model was given: the prompt in the chat template or the prompt template that the run was trained with."""
    note: str = ""
    """Why there is no answer, where it ended at once."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers prompts, written out as its run was trained."""

    trained: Trained
    how: Prompting

    @classmethod
    def opened(cls, source: Source) -> Speaker:
        """A run, an adapter folder or a model, ready to answer.

        Raises:
            AdapterError, ModelError, RunError: as `Source.loaded`; ModelError also for a classifier.
        """
        trained = source.loaded()
        if trained.task == "classification":
            raise ModelError(f"{source.given} is a classifier and generates no text: use `weftlora eval` on it.")
        stop_at_turns(trained, source.how.form)
        return cls(trained, source.how)

    def answer(
        self,
        prompt: Prompt,
        system: str | None,
        raw: bool,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        tools: list[Any] | None = None,
    ) -> Generation:
        """See `weftlora.train.generate`."""
        tokenizer = self.trained.base.tokenizer
        ids = prompt_ids(self.trained, self.how.written(prompt, system, raw), tools)
        started = time.monotonic()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            [answer] = complete(self.trained.model, tokenizer, [ids], max_new_tokens, temperature)
        seconds = time.monotonic() - started
        finished = bool(answer) and answer[-1] in stop_tokens(self.trained.model, tokenizer)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        note = ""
        if finished and not text.strip():
            note = f"the answer is empty, because generation ended at once: {self.how.reason(tokenizer, raw)}."
            log.warning("%s", note)
        shown: Any = (
            prompt if isinstance(prompt, str) else dict(prompt) if isinstance(prompt, Mapping) else list(prompt)
        )
        rate = round(len(answer) / max(seconds, 1e-9), 1)
        return Generation(shown, text, len(answer), finished, round(seconds, 4), rate, tokenizer.decode(ids), note)


def generate(
    source: Run | str | Path,
    prompt: Prompt,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    base: str | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Generation:
    """See `weftlora.train.generate`."""
    check_sampling(max_new_tokens, temperature, seed)
    given = Source.of(source, base)
    written = given.how.written(prompt, system, raw)  # what is wrong with it is said before anything is loaded
    held = tools_of([dict(each) if isinstance(each, Mapping) else each for each in tools or ()], "the prompt")
    if held is not None and isinstance(written, str):
        raise ConfigError("tools are written by a chat template, and this prompt is a text: leave the tools out.")
    return Speaker.opened(given).answer(prompt, system, raw, max_new_tokens, temperature, seed, held)


def check_sampling(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Refuse what generates nothing. Raises ConfigError."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: give at least 1.")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature={temperature} has no meaning: use 0 for greedy, or a positive number.")
    check_seed(seed, "seed")


class Conversation:
    """A run to talk to, as `weftlora.chat` opens it: what was said before is part of every prompt, if it was trained on conversations.

    A run that was trained on prompts and answers, or on text, answers every prompt by itself.
    """

    def __init__(
        self, speaker: Speaker, system: str | None, max_new_tokens: int, temperature: float, seed: int
    ) -> None:
        check_sampling(max_new_tokens, temperature, seed)
        self.speaker, self.system, self.seed = speaker, system, seed
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.messages: list[Message] = []
        """What was said so far, without the system turn."""

    @property
    def remembers(self) -> bool:
        """Whether what was said before is part of the next prompt."""
        return self.speaker.how.form == "chat"

    def say(self, text: str) -> Generation:
        """The answer to the next turn. Raises ConfigError, DataError."""
        turns: Prompt = [*self.messages, {"role": "user", "content": text}] if self.remembers else text
        found = self.speaker.answer(turns, self.system, False, self.max_new_tokens, self.temperature, self.seed)
        if self.remembers:
            said = {"role": "assistant", "content": found.text}
            self.messages += [{"role": "user", "content": text}, said]
        return found

    def forget(self) -> None:
        """Begin again; the system turn stays."""
        self.messages = []


def chat(
    source: Run | str | Path,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    base: str | None,
) -> Conversation:
    """See `weftlora.train.chat`."""
    check_sampling(max_new_tokens, temperature, seed)
    given = Source.of(source, base)
    given.how.written("", system)
    return Conversation(Speaker.opened(given), system, max_new_tokens, temperature, seed)


def run_of(source: Run | str | Path) -> Run | None:
    """The run that a source is, or in whose folder the adapter is; None for an adapter folder by itself.

    Raises:
        RunError: it is neither.
    """
    if isinstance(source, Run):
        return source
    folder = Path(source)
    if not (folder / "adapter_config.json").is_file():
        return Run.load(folder)
    above = folder.resolve().parent
    inside = folder.resolve().name == "adapter" or above.name == "checkpoints"
    holder = above if folder.resolve().name == "adapter" else above.parent
    return Run.load(holder) if inside and (holder / "run.json").is_file() else None


@dataclass(frozen=True)
class Source:
    """What is talked to or measured, as far as it is known before its weights are loaded."""

    given: Run | str | Path
    run: Run | None
    """The run that it is, or in whose folder it is."""
    how: Prompting
    base: str | None
    found: base_model.Base | None = None
    """Of a model by itself."""

    @classmethod
    def of(cls, source: Run | str | Path, base: str | None) -> Source:
        """A run, a run folder, an adapter folder in its run or out of it, or a model by itself: how prompts are written out is as it
        was trained, for a model in its chat template, if it has one.

        Raises:
            AdapterError, ConfigError, ModelError, RunError: as their names say.
        """
        if not isinstance(source, Run) and is_model(source):
            if base is not None:
                raise ConfigError(f"{source} is a model, not an adapter, so it has no other base: leave out --base.")
            found = base_model.find(base_model.Wanted(str(source), dtype=None), Path.cwd())
            form = "chat" if getattr(found.tokenizer, "chat_template", None) else "text"
            return cls(source, None, Prompting(form), None, found)
        run = run_of(source)
        alone = run is None and not isinstance(source, Run)
        return cls(source, run, Prompting.of_adapter(Path(str(source))) if alone else Prompting.of(run), base)

    @property
    def is_run(self) -> bool:
        """Whether it is a run itself, not an adapter or a model by itself."""
        return isinstance(self.given, Run) or (
            self.found is None and not (Path(self.given) / "adapter_config.json").is_file()
        )

    def loaded(self, adapted: bool = True) -> Trained:
        """With its weights; without its adapter where not `adapted`."""
        if self.found is not None:
            return load_model(self.found)
        if self.is_run and self.run is not None:
            return load_run(self.run, self.base, adapted=adapted)
        load = load_adapter if adapted else load_base
        return load(Path(str(self.given)), self.base, self.how.labels)


def stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's end-of-text token and what the model itself names."""
    own = getattr(model.generation_config, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (*named, tokenizer.eos_token_id) if token is not None})


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Answers to tokenised prompts, each up to and including its stop token; `temperature` 0 is greedy.

    The base's own sampling settings are set aside, so that greedy is greedy whatever its generation_config says. Where a model has
    places for so many tokens only, an answer ends with them.

    Raises:
        ModelError: a prompt leaves no place for an answer.
    """
    if (left := room(model, prompts)) is not None:
        max_new_tokens = min(max_new_tokens, left)
    pad = tokenizer.pad_token_id
    inputs = {key: value.to(model.device) for key, value in _left_padded(prompts, pad).items()}
    stop = stop_tokens(model, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        bos_token_id=tokenizer.bos_token_id,
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        use_cache=True,
        **sampling,
    )
    with evaluating(model):
        output = model.generate(**inputs, generation_config=settings)
    start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [_until_stop(row, stop) for row in output[:, start:].tolist()]


def room(model: Any, prompts: Sequence[list[int]]) -> int | None:
    """Tokens that answers to these prompts have places for; None where the model counts none.

    Raises:
        ModelError: a prompt leaves no place for an answer.
    """
    if (most := base_model.places(model)) is None:
        return None
    longest = max(len(prompt) for prompt in prompts)
    taken = 1 if model.config.is_encoder_decoder else longest
    if longest > most or taken >= most:
        raise ModelError(f"the prompt has {longest} tokens, and the model has places for {most}: give a shorter one.")
    return most - taken


def _left_padded(prompts: Sequence[list[int]], pad: int) -> dict[str, Tensor]:
    length = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, length - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _until_stop(tokens: list[int], stop: list[int]) -> list[int]:
    end = next((at + 1 for at, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Scores:
    """What was measured on some rows; None where a task has no such score.

    `loss` is in nats per answer token (per row for a classifier); `exact_match`, `bleu` and `rouge_l` are of greedy answers, each
    against the one reference of its row (`weftlora.runs.scores`); `exact_match`, `accuracy` and `macro_f1` are in [0, 1], `bleu` and
    `rouge_l` in [0, 100].
    """

    rows: int
    tokens: int
    loss: float
    perplexity: float | None = None
    exact_match: float | None = None
    bleu: float | None = None
    rouge_l: float | None = None
    accuracy: float | None = None
    macro_f1: float | None = None


@dataclass(frozen=True)
class Evaluation(Record):
    """The scores of a run (or of its frozen base) on one split."""

    run: str | None
    adapter: str
    task: str
    split: str
    scores: Scores
    domains: dict[str, Scores]
    seconds: float
    signatures: dict[str, str]
    """How BLEU and ROUGE-L were counted and by which version of their libraries; empty where there are no such scores."""


@dataclass(frozen=True)
class _Predictions:
    """What a model made of some rows, and what it should have: classes, or answers."""

    measured: Measured
    actual: list[int]
    answers: list[str]
    references: list[str]

    @classmethod
    def pooled(cls, parts: Iterable[_Predictions]) -> _Predictions:
        """Those of all rows, from disjoint parts."""
        each = list(parts)
        return cls(
            Measured.pooled(part.measured for part in each),
            *([one for part in each for one in getattr(part, name)] for name in ("actual", "answers", "references")),
        )


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, on which rows."""

    run: Run | None
    name: str
    trained: Trained
    split: str
    rows: Any
    size: int


def evaluate(
    source: Run | str | Path | Recipe,
    overrides: Sequence[str],
    split: str | None,
    limit: int | None,
    adapter: str,
    base: str | None,
    batch_size: int | None,
    max_new_tokens: int | None,
    answers: bool,
    progress: Progress,
) -> Evaluation:
    """See `weftlora.train.evaluate`."""
    if split is not None and split not in SPLITS:
        raise ConfigError(f"there is no split {split!r}: use {' or '.join(SPLITS)}.")
    if adapter not in ("trained", "none"):
        raise ConfigError(f"adapter={adapter!r} cannot be evaluated: use trained, or none for the frozen base.")
    started = time.monotonic()
    subject = _subject(source, overrides, split, adapter, base)
    split = subject.split
    rows = subject.rows if limit is None else subject.rows.select(range(min(limit, len(subject.rows))))
    base_model.check_places(subject.trained.model, rows)
    size = batch_size or subject.size
    groups = _by_domain(rows)
    bound = max_new_tokens if answers else 0
    found = {name: _predict(subject.trained, part, size, bound, progress) for name, part in groups.items()}
    scores, signatures = _scores(_Predictions.pooled(found.values()), len(rows))
    evaluation = Evaluation(
        run=str(subject.run.folder) if subject.run else None,
        adapter=subject.name,
        task=subject.trained.task,
        split=split,
        scores=scores,
        domains={name: _scores(part, len(groups[name]))[0] for name, part in found.items() if name},
        seconds=round(time.monotonic() - started, 3),
        signatures=signatures,
    )
    if subject.run and limit is None and not overrides:
        suffix = "" if adapter == "trained" else "-base"
        with holding(subject.run.folder, "weftlora eval"):
            subject.run.check_there()  # else these are another run's scores
            write_json(subject.run.folder / f"eval-{split}{suffix}.json", evaluation.record())
    return evaluation


def _subject(
    source: Run | str | Path | Recipe, overrides: Sequence[str], split: str | None, adapter: str, base: str | None
) -> _Subject:
    if isinstance(source, Run) or (isinstance(source, (str, Path)) and (Path(source).is_dir() or is_model(source))):
        given = Source.of(source, base)
        if foreign := [text for text in overrides if not text.startswith("data.")]:
            what = "this run" if given.is_run else "this adapter" if given.found is None else "this model"
            raise ConfigError(f"{foreign[0]!r} would make it another than {what}: only data.… can be changed here.")
        return (
            _by_itself(given, overrides, split, adapter)
            if given.run is None
            else _of_run(given, overrides, split, adapter)
        )
    if adapter == "trained":
        raise ConfigError(
            f"{source} is a recipe, not a run: train it first, or give --adapter none to measure its base."
        )
    recipe = Recipe.read(source, *overrides).model_copy(update={"adapter": {"recipe": "none"}})
    if base:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base})})
    prepared = preparing.prepare(recipe)
    trained = Trained(prepared.base, prepared.model, prepared.task)
    stop_at_turns(trained, prepared.data.format)
    return _Subject(None, "none", trained, *_split(prepared.data, split), recipe.train.batch_size)


def _of_run(given: Source, overrides: Sequence[str], split: str | None, adapter: str) -> _Subject:
    """A run, or an adapter in its folder, on the rows of the run."""
    run = cast(Run, given.run)
    recipe = recipe_of(run, *overrides)
    trained = given.loaded(adapted=adapter == "trained")
    stop_at_turns(trained, given.how.form)
    data = load_data(
        recipe.data, trained.base.tokenizer, base_dir=recipe.base_dir, task=trained.task, labels=run.data["labels"]
    )
    name = run.recipe["adapter"].get("recipe", "weftlora") if given.is_run else str(given.given)
    kept = run if given.is_run else None  # whose scores these are
    return _Subject(
        kept, name if adapter == "trained" else "none", trained, *_split(data, split), recipe.train.batch_size
    )


def _by_itself(given: Source, overrides: Sequence[str], split: str | None, adapter: str) -> _Subject:
    """An adapter folder out of its run, or a model, on rows that are named, read as those that it was trained on.

    Raises:
        DataError: no rows are named.
    """
    how, of_model = given.how, given.found is not None
    said = {"format": how.form, "prompt_template": how.template, "max_length": how.max_length}
    section = {} if of_model else {key: value for key, value in said.items() if value is not None}
    section |= {"system": "fold"} if how.fold else {}
    recipe = Recipe.read(builtin("none") | {"data": section}, *overrides)
    name = split or ("validation" if recipe.data.test is None and recipe.data.validation is not None else "test")
    if getattr(recipe.data, name) is None:
        raise DataError(
            f"{given.given} does not say on which rows it is measured: name them with data.{name}=rows.jsonl."
        )
    recipe.data.check_files(recipe.base_dir)
    trained = given.loaded(adapted=adapter == "trained")
    stop_at_turns(trained, how.form)
    classes = trained.model.config.id2label if trained.task == "classification" else {}
    data = load_data(
        recipe.data,
        trained.base.tokenizer,
        base_dir=recipe.base_dir,
        task=trained.task,
        labels=[classes[number] for number in sorted(classes)] or None,
        only=name,
    )
    called = "none" if of_model or adapter == "none" else str(given.given)
    return _Subject(None, called, trained, name, data.train, recipe.train.batch_size)


def _split(data: Any, wanted: str | None) -> tuple[str, Any]:
    """The split to measure on and its rows: the one that is wanted, or the test rows, or the validation rows where there are none.

    Raises:
        DataError: there is none.
    """
    there = [name for name in SPLITS if getattr(data, name) is not None and len(getattr(data, name))]
    if wanted is None and there == ["validation"]:
        log.warning(
            "the data has no test rows: these are the validation rows; do not use them to judge what was chosen on them"
        )
    name = wanted or (there[0] if there else SPLITS[0])
    if name not in there:
        hint = f"use --split {there[0]}." if there else f"name a file with data.{name}=...."
        raise DataError(f"the data has no {name} split: {hint}")
    return name, getattr(data, name)


def _by_domain(rows: Any) -> dict[str, Any]:
    """The rows of each domain; one nameless group where rows carry none."""
    if "domain" not in rows.column_names:
        return {"": rows}
    where: dict[str, list[int]] = {}
    for index, name in enumerate(rows["domain"]):
        where.setdefault(str(name or ""), []).append(index)
    return {name: rows.select(indices) for name, indices in sorted(where.items())}


def _predict(trained: Trained, rows: Any, size: int, max_new_tokens: int | None, progress: Progress) -> _Predictions:
    """The losses, and the classes or the answers of at most `max_new_tokens` tokens: None as many as it takes, 0 no answers."""
    measured = mean_loss(trained.model, rows, Collator(trained.base.tokenizer.pad_token_id), size, progress)
    if trained.task == "classification":
        return _Predictions(measured, list(rows["labels"]), [], [])
    if max_new_tokens == 0:
        return _Predictions(measured, [], [], [])
    return _Predictions(measured, [], *_answers(trained, rows, size, max_new_tokens, progress))


def _answers(
    trained: Trained, rows: Any, size: int, max_new_tokens: int | None, progress: Progress
) -> tuple[list[str], list[str]]:
    """Greedy answers and their references; batches are sorted by length so that little is padded."""
    prompts = sorted(generation_prompts(rows), key=lambda prompt: len(prompt.input_ids))
    if not prompts:
        return [], []
    tokenizer, texts = trained.base.tokenizer, list[str]()
    bound = max_new_tokens or 1 + max(sum(label != IGNORE for label in labels) for labels in rows["labels"])
    for done in range(0, len(prompts), size):
        batch = prompts[done : done + size]
        answers = complete(trained.model, tokenizer, [prompt.input_ids for prompt in batch], bound)
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
        progress(Tick("answers", min(done + size, len(prompts)), len(prompts)))
    return texts, [prompt.reference for prompt in prompts]


def _scores(found: _Predictions, rows: int) -> tuple[Scores, dict[str, str]]:
    """The scores of what was predicted for so many rows, and the signatures of BLEU and ROUGE-L."""
    measured, actual = found.measured, found.actual
    if actual:
        right, f1 = accuracy(measured.predicted, actual), macro_f1(measured.predicted, actual)
        return Scores(rows, 0, measured.loss, accuracy=right, macro_f1=f1), {}
    perplexity = measured.perplexity if math.isfinite(measured.perplexity) else None
    plain = Scores(rows, measured.count, measured.loss, perplexity)
    if not found.references:
        return plain, {}
    scores: dict[str, Any] = {"exact_match": exact_match(found.answers, found.references)}
    signatures = {}
    for name, score in (("bleu", bleu), ("rouge_l", rouge_l)):
        if (counted := score(found.answers, found.references)) is not None:
            scores[name], signatures[name] = counted
    return dataclasses.replace(plain, **scores), signatures
