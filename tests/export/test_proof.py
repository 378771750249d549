"""An export is kept only if stock peft computes from it what the live adapter does, on the base that is named."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import weftlora
from families import FAMILIES, randomise
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import AdapterError, ConfigError
from weftlora.export import live, lora, proof, stock_process
from weftlora.export.live import Outputs

Adapted = Callable[..., PeftModel]
Jobs = list[Mapping[str, Any]]


def batch() -> dict[str, torch.Tensor]:
    return FAMILIES["llama"].batch()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_weft_cannot_be_imported_where_the_proof_runs(adapted: Adapted, llama_folder: Path, tmp_path: Path) -> None:
    """A weftlora adapter is what only weftlora can load: stock peft must fail on it there, although weftlora is installed here."""
    adapted(weftlora.PlainLoraConfig(r=2)).save_pretrained(tmp_path / "weftlora")
    save_file({"0.input_ids": batch()["input_ids"]}, tmp_path / "inputs.safetensors")
    job = {
        "base": str(llama_folder), "model_class": "LlamaForCausalLM", "load": {}, "dtype": "float32", "pad_token_id": None,
        "adapter": str(tmp_path / "weftlora"), "sites": None, "inputs": str(tmp_path / "inputs.safetensors"),
        "outputs": str(tmp_path / "out.safetensors"), "device": "cpu", "threads": 1,
    }  # fmt: skip
    said = proof.run_jobs([job, {**job, "adapter": None}], tmp_path)
    assert "WEFT" in str(said[0])
    assert said[1] is None


def test_the_error_is_relative_to_the_largest_logit() -> None:
    one = Outputs([torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.0]])], [])
    two = Outputs([torch.tensor([[1.0, -4.0]]), torch.tensor([[2.0, 0.4]])], [])
    assert one.furthest(two) == pytest.approx(0.4 / 4)
    assert one.distance(two) == pytest.approx(0.4)


def test_padding_is_no_difference() -> None:
    logits = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert (
        live.without_padding(logits, {"attention_mask": mask}).tolist()
        == logits.reshape(6, 2)[[0, 1, 3, 4, 5]].tolist()
    )
    assert (
        live.without_padding(logits[:, 0], {"attention_mask": mask}) is not None
    )  # one logit a row: nothing to leave out


def test_the_record_and_the_card_say_what_was_measured_on_what(adapted: Adapted, in_process: Jobs, tmp_path: Path):
    model = adapted(weftlora.LoraDashConfig(r=2))
    with_inputs = weftlora.export_lora(
        model, tmp_path / "a", inputs=[batch(), {"input_ids": batch()["input_ids"][:1, :3]}]
    )
    seeded = weftlora.export_lora(model, tmp_path / "b")
    unproved = weftlora.export_lora(model, tmp_path / "c", verify=False)
    assert with_inputs.proof
    assert with_inputs.proof.inputs == "the inputs that were given"
    assert seeded.proof
    assert seeded.proof.inputs == "random token ids (seed 0)"
    for found in (with_inputs, seeded):
        assert found.proof.error < 1e-5 < 0.1 < found.proof.adapter_effect
        card = (found.folder / "README.md").read_text()
        assert f"{found.proof.error:.2g} of the largest logit" in card
        assert card.split("---\n", 2)[2].lstrip().splitlines()[0] == "A stock LoRA: it loads without `import weftlora`."
    assert unproved.proof is None
    assert "Not verified" in (tmp_path / "c" / "README.md").read_text()
    assert json.loads(json.dumps(seeded.record()))["proof"]["tolerance"] == 1e-5
    assert len(in_process) == 2


def test_a_wrong_file_is_not_kept(
    adapted: Adapted, in_process: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, model = lora.save, adapted(weftlora.PlainLoraConfig(r=2))

    def wrong(place: Path, *rest: Any) -> None:
        save(place, *rest)
        tensors = load_file(place / "adapter_model.safetensors")
        name = next(key for key in tensors if "lora_B" in key)
        save_file({**tensors, name: 1.001 * tensors[name]}, place / "adapter_model.safetensors")

    monkeypatch.setattr(lora, "save", wrong)
    with pytest.raises(AdapterError, match=r"differs from the live one by .* of the largest logit \(allowed: 1e-05\)"):
        weftlora.export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["alpha_pattern", "lora_alpha", "target_modules", "tensor"])
def test_a_config_or_file_that_stock_peft_reads_differently_is_not_kept(
    what: str, adapted: Adapted, in_process: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = lora.save
    model = adapted(weftlora.PlainLoraConfig(r=4, rank_pattern={"q_proj": 2}))

    def wrong(place: Path, *rest: Any) -> None:
        save(place, *rest)
        file = place / "adapter_config.json"
        config = json.loads(file.read_text())
        other = {"alpha_pattern": {}, "lora_alpha": 5, "target_modules": config["target_modules"][1:]}
        file.write_text(json.dumps({**config, **({what: other[what]} if what in other else {})}))
        if what == "tensor":
            tensors = load_file(place / "adapter_model.safetensors")
            tensors.pop(next(iter(tensors)))
            save_file(tensors, place / "adapter_model.safetensors")

    monkeypatch.setattr(lora, "save", wrong)
    with pytest.raises(AdapterError, match="stock libraries do not read it as it was meant"):
        weftlora.export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_another_base_in_memory_than_the_folder_named_is_noticed(
    adapted: Adapted, in_process: Jobs, llama_folder: Path, tmp_path: Path
) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(1.5)
    with pytest.raises(AdapterError, match="say base='memory' or the right folder"):
        weftlora.export_lora(model, tmp_path / "lora")
    found = weftlora.export_lora(model, tmp_path / "lora", base="memory")
    assert found.proof
    assert found.proof.error < 1e-5
    assert in_process[0]["base"] == str(llama_folder)
    assert in_process[1]["base"].startswith(str(tmp_path / ".lora.weft-"))
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_a_base_that_is_only_in_memory_is_saved_for_the_proof(in_process: Jobs, tmp_path: Path) -> None:
    model = get_peft_model(FAMILIES["bert"].build(), weftlora.TiedLoraConfig(r=2, modules_to_save=["classifier"]))
    randomise(model)
    model.eval()
    before = state(model)
    found = weftlora.export_lora(model, tmp_path / "lora")
    assert found.proof
    assert found.proof.error < 1e-5
    assert found.whole_modules == ["bert.pooler.dense", "classifier"]  # no checkpoint is known to have the pooler
    assert same(state(model), before)


def test_the_model_is_left_as_it_was(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    model.add_adapter("second", weftlora.TiedLoraConfig(r=2))
    model.train()
    before, required = state(model), [p.requires_grad for p in model.parameters()]
    active = model.active_adapter
    found = weftlora.export_lora(model, tmp_path / "second", adapter="second")
    assert [p.requires_grad for p in model.parameters()] == required
    weftlora.merge(model, tmp_path / "merged", "bfloat16", accept_loss=True)
    assert same(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == required
    assert model.training
    assert all(m.training for m in model.modules())
    assert model.active_adapter == active
    assert {tuple(m.active_adapters) for m in model.modules() if isinstance(m, WeftLinear)} == {("default",)}
    assert found.adapters == ("second",)


def test_several_adapters_are_one_export_or_one_each(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("second", weftlora.PlainLoraConfig(r=3, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("second")
    randomise(model, seed=3)
    both = weftlora.export_lora(model, tmp_path / "both", adapter=["default", "second"])
    alone = weftlora.export_lora(model, tmp_path / "alone")
    assert {name.rpartition(".")[2]: r for name, r in both.ranks.items()} == {"q_proj": 5, "v_proj": 2, "o_proj": 3}
    assert alone.adapters == ("second",)
    assert set(alone.ranks.values()) == {3}
    assert both.proof.error < 1e-5
    assert alone.proof.error < 1e-5
    assert both.proof.adapter_effect != alone.proof.adapter_effect


def test_an_adapter_that_transformers_loaded_leaves_too(
    adapted: Adapted, llama_folder: Path, in_process: Jobs, tmp_path: Path
) -> None:
    adapted(weftlora.TiedLoraConfig(r=2)).save_pretrained(tmp_path / "saved")
    base: Any = type(FAMILIES["llama"].build()).from_pretrained(llama_folder)
    base.load_adapter(str(tmp_path / "saved"), adapter_name="own")
    found = weftlora.export_lora(base, tmp_path / "lora")
    assert found.adapters == ("own",)
    assert found.proof.error < 1e-5 < found.proof.adapter_effect
    merged = weftlora.merge(base, tmp_path / "merged")
    assert merged.proof.error < 1e-5
    by_folder = weftlora.export_lora(tmp_path / "saved", tmp_path / "again", verify=False, base=llama_folder)
    assert by_folder.ranks == found.ranks


def test_what_cannot_be_proved_says_so_and_can_be_exported_unproved(tmp_path: Path) -> None:
    net = get_peft_model(FAMILIES["plain"].build(), weftlora.PlainLoraConfig(r=2, exclude_modules=["head"]))
    with pytest.raises(AdapterError, match=r"PlainNet is not a model of transformers.*use verify=False"):
        weftlora.export_lora(net, tmp_path / "lora", inputs=[FAMILIES["plain"].batch()])
    with pytest.raises(AdapterError, match=r"no token ids to run a PlainNet on: give inputs"):
        weftlora.export_lora(net, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
    assert weftlora.export_lora(net, tmp_path / "lora", verify=False).proof is None


def test_sixteen_bits_cost_what_they_say(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    found = weftlora.export_lora(model, tmp_path / "lora", dtype="bfloat16")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert found.proof
    assert found.proof.error < 1e-5
    assert found.rounding
    lost = whole = 0.0
    for name in found.ranks:
        site = model.get_base_model().get_submodule(name).site("default")
        exact = site.scale * site.structure.B.detach().double() @ site.structure.A.detach().double()
        b, a = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "BA")
        lost, whole = lost + float((b @ a - exact).square().sum()), whole + float(exact.square().sum())
    assert found.rounding.lost == pytest.approx((lost / whole) ** 0.5)
    assert 1e-3 < found.rounding.lost < 1e-2
    assert found.rounding.error
    assert 1e-5 < found.rounding.error < 1e-2
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("structure.B")).mul_(1e6)
    with pytest.raises(AdapterError, match="float16 cannot hold"):
        weftlora.export_lora(model, tmp_path / "half", dtype="float16", verify=False)


def test_an_adapter_that_diverged_is_refused(adapted: Adapted, in_process: Jobs, tmp_path: Path) -> None:
    model = adapted(weftlora.PlainLoraConfig(r=2))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith("structure.B")).fill_(float("nan"))
    for verify in (True, False):
        with pytest.raises(AdapterError, match="diverged"):
            weftlora.export_lora(model, tmp_path / "lora", verify=verify)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adapter": "other"}, "no adapter 'other'"),
        ({"dtype": "int8"}, "dtype='int8' is not a dtype to write"),
        ({"approximate": "mean"}, "did you mean 'mean-gate'"),
        ({"approximate": "mean-gate"}, "belong together"),
        ({"data": []}, "belong together"),
        ({"approximate": "mean-gate", "data": [{"input_ids": torch.ones(1, 2, dtype=torch.long)}]}, "exports exactly"),
        ({"inputs": []}, "proves nothing"),
        ({"approximate": "mean-gate", "data": "rows.jsonl", "rows": 0}, "rows=0 leaves nothing"),
        ({"inputs": [[1, 2]]}, "inputs must be batches"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], sentence: str, adapted: Adapted, tmp_path: Path) -> None:
    with pytest.raises((AdapterError, ConfigError), match=sentence):
        weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_models_that_have_nothing_to_export(adapted: Adapted, tmp_path: Path) -> None:
    from peft import LoraConfig

    with pytest.raises(AdapterError, match="no adapter to export"):
        weftlora.export_lora(FAMILIES["llama"].build(), tmp_path / "lora")
    stock = get_peft_model(FAMILIES["llama"].build(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="stock LoRA needs none"):
        weftlora.export_lora(stock, tmp_path / "lora")
    merged = adapted(weftlora.PlainLoraConfig(r=2))
    merged.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        weftlora.export_lora(merged, tmp_path / "lora")
    with pytest.raises(AdapterError, match="has selected none yet"):
        weftlora.export_lora(adapted(weftlora.FlexoraConfig(r=2)), tmp_path / "lora")
    empty = adapted(weftlora.AllocLoraConfig(r=2))
    for name, buffer in empty.named_buffers():
        if name.endswith(".mask"):
            buffer.zero_()
    with pytest.raises(AdapterError, match="nothing to export"):
        weftlora.export_lora(empty, tmp_path / "lora")
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.export_lora(tmp_path, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_what_its_config_names_says_so(adapted: Adapted, tmp_path: Path) -> None:
    model = adapted(weftlora.LoraDashConfig(r=2, after=100))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()(**batch()).loss.backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="still without the launch of Dash"):
        weftlora.export_lora(model, tmp_path / "lora", verify=False)


def test_the_process_that_proves_does_not_outlive_a_killed_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, born = tmp_path / "slow.py", tmp_path / "born"
    script.write_text(
        "import os, pathlib, runpy, sys, threading, time\n"
        f"follow = runpy.run_path({stock_process.__file__!r})['follow']\n"
        "threading.Thread(target=follow, args=(int(sys.argv[2]),), daemon=True).start()\n"
        f"pathlib.Path({str(born)!r}).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(stock_process, "__file__", str(script))
    child = os.fork()
    if child == 0:
        proof.run_jobs([], tmp_path)
        os._exit(0)
    end = time.monotonic() + 30
    while not (born.exists() and born.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    process = Path(f"/proc/{born.read_text()}/stat")
    end = time.monotonic() + 5
    while process.exists() and process.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.02)
    assert not process.exists() or process.read_text().split()[2] == "Z"
