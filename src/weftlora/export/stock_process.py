"""What stock transformers and peft compute from an exported folder, in a process where weftlora cannot be imported.

    python -I stock_process.py JOBS.json PIPE FOLDERS      (run by `weftlora.export.proof`; imports nothing of weftlora)

FOLDERS is a JSON list of where the stock libraries lie, looked through before this Python's own.

Every job names a base (`base`, `model_class`, `load`; `dtype` is what it is loaded in before it computes in fp32), perhaps an
adapter folder with what its sites should be (`sites`: {name: rank}, null to ask nothing), a safetensors file of batches (`inputs`,
keys "0.input_ids", "1.input_ids", ...) and where to write what comes out (`outputs`: "0.logits" and, where the batch has labels,
"0.loss"; fp32). The last line on stdout is a JSON list with a sentence per job, or null where all went well.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any


def follow(descriptor: int) -> None:
    """End at once when the process that holds the other end of a pipe has ended: nobody is left to read what comes out."""
    os.read(descriptor, 1)
    os._exit(1)


def main(path: str) -> None:
    """Run the jobs in a file."""
    sys.modules["weftlora"] = None  # type: ignore[assignment]  # an editable install would be found even so
    jobs = json.loads(Path(path).read_text(encoding="utf-8"))
    said = [_told(job) for job in jobs]
    if loaded := [name for name in sys.modules if name.startswith("weftlora.")]:
        raise SystemExit(f"weftlora was imported: {loaded[0]}")
    sys.stdout.write(f"\n{json.dumps(said)}\n")


def _told(job: dict[str, Any]) -> str | None:
    try:
        return _run(job)
    except Exception as error:  # whatever stock libraries say is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"


def _run(job: dict[str, Any]) -> str | None:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(job["threads"])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cls = getattr(transformers, job["model_class"])
    torch.manual_seed(982451653)  # what the base lacks is drawn, and must not be as it was in training by accident
    stored = getattr(torch, job["dtype"])  # first as in training, so that a checkpoint is rounded as it was there
    load = {"dtype": stored, **job["load"]}
    model = cls.from_pretrained(job["base"], use_safetensors=True, trust_remote_code=False, **load)
    quantised = getattr(model, "hf_quantizer", None) is not None  # stays where and as it is loaded
    model = model if quantised else model.float()
    if job["pad_token_id"] is not None:
        model.config.get_text_config().pad_token_id = job["pad_token_id"]
    for layer in model.modules():
        if hasattr(
            layer, "support_avx512bf16_for_cpu"
        ):  # bitsandbytes' other layout takes no layer of less than 32 rows
            layer.support_avx512bf16_for_cpu = False
    if not quantised:
        model.to(job["device"])
    if job["adapter"] is not None:
        from peft import PeftModel

        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(model, job["adapter"])
        if missing := [str(w.message) for w in heard if "missing adapter keys" in str(w.message)]:
            return missing[0][:400]
        if job["sites"] is not None and (problem := _sites(model, job["sites"])):
            return problem
    given = load_file(job["inputs"])
    outputs: dict[str, torch.Tensor] = {}
    model.eval()
    with torch.no_grad():
        for number in sorted({int(key.split(".")[0]) for key in given}):
            batch = {k.split(".", 1)[1]: v.to(job["device"]) for k, v in given.items() if k.startswith(f"{number}.")}
            out = model(**batch)
            outputs[f"{number}.logits"] = out.logits.float().cpu().contiguous()
            if getattr(out, "loss", None) is not None:
                outputs[f"{number}.loss"] = out.loss.float().cpu().reshape(1)
    save_file(outputs, job["outputs"])
    return None


def _sites(model: Any, wanted: dict[str, int]) -> str | None:
    """What stock peft made of the config, where that is not rank `wanted` and scale 1 at exactly those sites."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if "default" in getattr(layer, "lora_A", ()):
            site = name.replace(".base_layer", "")
            whole = f"{site}.{getattr(layer, 'parameter_name', 'weight')}"
            found[whole if whole in wanted else site] = layer.r["default"], layer.scaling["default"]
    meant = {name: (rank, 1.0) for name, rank in wanted.items()}
    wrong = sorted(name for name in found.keys() | meant.keys() if found.get(name) != meant.get(name))
    if not wrong:
        return None
    return f"{wrong[0]} has (rank, scale) {found.get(wrong[0])} in stock peft and should have {meant.get(wrong[0])}"


if __name__ == "__main__":
    threading.Thread(target=follow, args=(int(sys.argv[2]),), daemon=True).start()
    sys.path[:0] = json.loads(sys.argv[3])
    main(sys.argv[1])
