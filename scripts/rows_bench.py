"""What it costs to turn a file of conversations into tokens and labels, beside trl's preparation of the same rows.

    python scripts/rows_bench.py --out bench/rows.json            100,000 rows, a quarter of an hour
    python scripts/rows_bench.py --large 0.5 2 --out bench/rows.json   files of 0.5 and 2 GB beside them, for the memory alone
    python scripts/rows_bench.py --rounds 0 --large 0.5 2 --out bench/rows.json   those files alone, into the record that is there

Rows are drawn from a small lexicon, and the tokenizer (8,000 tokens, byte-level BPE) is trained on some of them, so nothing is
downloaded. The chat template marks what the assistant says, which trl needs for a loss on its answers alone. Every measurement is a
process of its own, the two sides by turns; a second start finds what the first one kept. Seconds are from the opening of the file to
the finished rows, without imports: of the clock, and of the processors for a machine that is not quiet. Memory is the most that was
held, of the process and of its largest child.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LENGTH = 1024
LARGE = {"words": 12, "letters": (100, 300)}
"""Rows of the large files: 10 KB each, and few tokens in them, since what they are for is the memory, which no token is kept in."""


def lexicon(letters: tuple[int, int], seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(*letters))) for _ in range(4000)]


def rows(count: int, words: int, letters: tuple[int, int] = (2, 9), seed: int = 0):
    """Conversations of four messages, `words` words each on average."""
    known, rng = lexicon(letters), random.Random(seed)
    for _ in range(count):
        said = [" ".join(rng.choices(known, k=rng.randint(words // 2, words * 3 // 2))) for _ in range(4)]
        yield {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]}


def write(path: Path, count: int, words: int, letters: tuple[int, int] = (2, 9)) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows(count, words, letters):
            file.write(json.dumps(row) + "\n")


def write_large(path: Path, size: int) -> None:
    """Some thousand rows again and again, each with a number before its first words, so that no two are copies."""
    lines = [json.dumps(row).split('"content": "', 1) for row in rows(2000, **LARGE)]
    written = number = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            before, after = lines[number % len(lines)]
            number += 1
            written += file.write(f'{before}"content": "{number} {after}\n')


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=marks, initial_alphabet=bare.pre_tokenizer.alphabet())
    bare.train_from_iterator((m["content"] for row in rows(2000, 50) for m in row["messages"]), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def make_word_tokenizer(folder: Path, letters: tuple[int, int]) -> None:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<unk>", "</s>", "<|im_start|>", "<|im_end|>"]
    bare = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate([*marks, *lexicon(letters)])}, "<unk>")
    )
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=marks[2:],
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


class Watch:
    """Seconds of the clock and of the processors, added up over the blocks that it is around."""

    def __init__(self) -> None:
        self.seconds = self.cpu = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter(), self._cpu()

    def __exit__(self, *error: object) -> None:
        self.seconds += time.perf_counter() - self.began[0]
        self.cpu += self._cpu() - self.began[1]

    def _cpu(self) -> float:
        return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def ours(folder: Path, file: Path, processes: int) -> dict[str, float]:
    from transformers import AutoTokenizer

    from weftlora.data import DataConfig, load

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    section = {
        "train": str(file),
        "max_length": LENGTH,
        "truncate": "completion",
        "validation_fraction": 0.0,
        "processes": processes,
    }
    watch = Watch()
    with watch:
        loaded = load(DataConfig.parse(section), tokenizer)
    counts = loaded.counts["train"]
    return {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu,
        "rows": len(loaded.train),
        "tokens": counts.tokens,
        "answer_tokens": counts.answer_tokens,
    }


def theirs(folder: Path, file: Path, processes: int) -> dict[str, float]:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small))
    watch = Watch()
    prepare = SFTTrainer._prepare_dataset

    def timed(self, *args, **kwargs):
        with watch:
            return prepare(self, *args, **kwargs)

    SFTTrainer._prepare_dataset = timed
    with watch:
        data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "datasets"))
    args = SFTConfig(
        output_dir=str(folder / "out"),
        dataset_num_proc=processes if processes > 1 else None,
        assistant_only_loss=True,
        max_length=LENGTH,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    made = trainer.train_dataset
    held = made.with_format("numpy")[: min(1000, len(made))]
    return {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu,
        "rows": len(made),
        "answer_tokens_of_1000": int(sum((row != -100).sum() for row in held["labels"])),
    }


def measured(side: str, folder: Path, file: Path, processes: int, cache: Path) -> dict[str, float]:
    """One side in a process of its own."""
    told = [sys.executable, __file__, "--one", side, str(folder), str(file), str(processes)]
    clean = {**os.environ, "XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "hf"), "HF_HUB_OFFLINE": "1"}
    clean |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(told, env=clean, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(record: dict[str, object], folder: Path, given: argparse.Namespace) -> None:
    """Both sides on the same rows, by turns, into the record."""
    file = folder / "rows.jsonl"
    write(file, given.rows, given.words)
    record["rows"], record["megabytes"] = given.rows, round(file.stat().st_size / 2**20, 1)
    for processes in given.processes:
        held: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": [], "ours again": []}
        for turn in range(given.rounds):
            for side in ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours"):
                cache = folder / f"cache-{processes}-{turn}-{side}"
                held[side].append(measured(side, folder, file, processes, cache))
                if side == "ours":
                    held["ours again"].append(measured(side, folder, file, processes, cache))
                for path in (cache, folder / "datasets"):
                    subprocess.run(["rm", "-rf", str(path)], check=True)
        case = {
            side: {
                "rounds": found,
                "median_s": statistics.median(each["seconds"] for each in found),
                "median_cpu_s": statistics.median(each["cpu_seconds"] for each in found),
            }
            for side, found in held.items()
        }
        cpu = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(held["ours"], held["theirs"], strict=True)]
        case["times_as_many_rows_per_cpu_second"] = round(statistics.median(cpu), 3)
        pairs = [b["seconds"] / a["seconds"] for a, b in zip(held["ours"], held["theirs"], strict=True)]
        case["times_as_many_rows_per_second"] = round(statistics.median(pairs), 3)
        memory = [a["mb"] / b["mb"] for a, b in zip(held["ours"], held["theirs"], strict=True)]
        case["memory_of_theirs"] = round(statistics.median(memory), 3)
        record["cases"][f"{processes} processes"] = case
        keep(record, given.out)  # what was measured is not lost with what is measured next
        print(
            case["times_as_many_rows_per_cpu_second"],
            processes,
            {side: round(each["median_s"], 2) for side, each in case.items() if isinstance(each, dict)},
            case["times_as_many_rows_per_second"],
            case["memory_of_theirs"],
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=40, help="words of a message")
    parser.add_argument("--rounds", type=int, default=3, help="0: nothing but the large files")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--large", type=float, nargs="*", default=[], help="gigabytes of further files, for the memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        side, folder, file, processes = given.one
        found = {"ours": ours, "theirs": theirs}[side](Path(folder), Path(file), int(processes))
        found["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found["child_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps(found))
        return 0
    command = "python scripts/rows_bench.py " + " ".join(sys.argv[1:])
    record = {
        "command": command,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("transformers", "tokenizers", "datasets", "trl")
        },
        "cases": {},
    }
    if not given.rounds and given.out and given.out.is_file():
        record = json.loads(given.out.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder / "tokenizer")
        if given.rounds:
            compared(record, folder, given)
        make_word_tokenizer(folder / "large" / "tokenizer", LARGE["letters"])
        for gigabytes in given.large:
            large = folder / "large.jsonl"
            write_large(large, int(gigabytes * 2**30))
            found = measured("ours", folder / "large", large, max(given.processes), folder / "cache-large")
            subprocess.run(["rm", "-rf", str(folder / "cache-large")], check=True)
            told = {
                "command": command,
                "processes": max(given.processes),
                "megabytes": round(large.stat().st_size / 2**20),
            }
            record.setdefault("large", {})[f"{gigabytes:g} GB"] = told | found
            keep(record, given.out)
            print("large", record["large"][f"{gigabytes:g} GB"], flush=True)
    keep(record, given.out)
    return 0


def keep(record: dict[str, object], out: Path | None) -> None:
    """Write the record, as far as it goes."""
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
