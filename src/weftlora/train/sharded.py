"""Training a model that is split among processes: its checkpoints are those of one process.

    adapter_model.safetensors    the adapter, whole, without the base: each of its tensors is gathered by itself
    optimizer.pt                 what the optimiser keeps, whole
    the rest                     as Trainer writes it

The main process writes them, the base is never gathered, and there are no shards to miss: any number of processes, under any
wrapper, goes on from them. What is read back is cut into the parts that the processes hold now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from torch.optim import Optimizer

from weftlora.adapter.shards import edited, full, is_shard, is_sharded, put, whole
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError, RunError
from weftlora.host.attach import schedules, unwrapped

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of the adapters of `model`, by name, whole and on the CPU. All processes must call it."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Site, ModulesToSaveWrapper)):
            for key, value in module.state_dict(keep_vars=True).items():
                found[_plain(f"{name}.{key}")] = full(value).cpu()
    return found


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


@contextmanager
def whole_sites(model: nn.Module) -> Iterator[None]:
    """Every adapter of `model` whole for the length of the block, cut again after it. All processes must enter it together."""
    with ExitStack() as held:
        for module in model.modules():
            if isinstance(module, (Site, ModulesToSaveWrapper)):
                held.enter_context(whole(module))
        yield


def save(model: nn.Module, folder: str | Path, main: bool) -> None:
    """Write the adapter folder of a model that is split among processes, from the main one. All must call it."""
    tensors = whole_adapter(model)
    if main:
        cast(PeftModel, unwrapped(model)).save_pretrained(str(folder), state_dict=tensors)


def load(model: nn.Module, folder: str | Path) -> None:
    """Take over what `save` wrote of the active adapter, each process its part.

    Not by `load_state_dict`, which units of FSDP2 answer by looking at all of their parameters again.

    Raises:
        RunError: a tensor is missing, or of another shape.
    """
    adapter = str(cast(PeftModel, unwrapped(model)).active_adapter)
    saved = load_peft_weights(str(folder), device="cpu")
    for name, value in _saved_names(model, adapter):
        given = saved.get(name)
        if given is None or (not is_shard(value) and given.shape != value.shape):
            raise RunError(
                f"{folder} has no {name} of the shape {list(value.shape)}: it was saved with another config; resume with the run's "
                "own settings."
            )
        put(value, given.to(value.device, value.dtype))
    for schedule in schedules(model).values():
        schedule.prepare()


def _saved_names(model: nn.Module, adapter: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a file of this adapter has, by its name there."""
    for name, module in model.named_modules():
        name = _plain(f"{name}.").removesuffix(".")
        if isinstance(module, Site) and name.endswith(f".weft_site.{adapter}"):
            for key, value in module.state_dict(keep_vars=True).items():
                yield f"{name.removesuffix(f'.{adapter}')}.{key}", value
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in module.state_dict(keep_vars=True).items():
                if key.startswith(own := f"modules_to_save.{adapter}."):
                    yield f"{name}.{key.removeprefix(own)}", value


class WholeOptimizer:
    """Stands in for an optimiser of split parameters where its state is saved or loaded: whole, as one process would have it."""

    def __init__(self, optimizer: Any) -> None:
        self.inner: Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.parameters = [p for group in self.inner.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """As the optimiser's own. All processes must call it."""
        found = self.inner.state_dict()
        for number, values in found["state"].items():
            found["state"][number] = {
                name: self._whole(value, self.parameters[number]) for name, value in values.items()
            }
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over such a state, each process its part."""
        state = {**state, "state": {}} | {
            "state": {
                number: {name: self._part(value, self.parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
        }
        self.inner.load_state_dict(state)

    def _whole(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        with torch.no_grad(), edited(value, parameter) as found:
            return found.cpu().clone()

    def _part(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        part = torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
        put(part, value.to(parameter.device))
        return part


class Sharded:
    """Mixed into a trainer: see the module. Under FSDP1 and DeepSpeed, Trainer's own files are written beside the adapter."""

    def _as_ordinary(self) -> bool:
        """Whether the model is split in a way that is cut and joined here."""
        model = cast(Any, self).model
        return is_sharded(model) and not hasattr(next(model.parameters()), "_fsdp_flattened")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter, without the base."""
        trainer: Any = self
        parent: Any = super()
        if not is_sharded(trainer.model):
            parent.save_model(output_dir, _internal_call)
            return
        folder = output_dir or trainer.args.output_dir
        save(trainer.model, folder, trainer.args.should_save)
        if trainer.args.should_save:
            torch.save(trainer.args, Path(folder) / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        parent: Any = super()
        with self._ordinary():
            parent._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        with self._ordinary():
            parent._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        parent: Any = super()
        trainer: Any = self
        if not self._as_ordinary():
            parent._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load(trainer.model, resume_from_checkpoint)

    @contextmanager
    def _ordinary(self) -> Iterator[None]:
        """Trainer takes the model for one that is not split, and its optimiser for one of whole tensors."""
        trainer: Any = self
        if not self._as_ordinary():
            yield
            return
        optimizer, enabled = trainer.optimizer, trainer.is_fsdp_enabled
        trainer.is_fsdp_enabled = False
        trainer.optimizer = None if optimizer is None else _Everywhere(WholeOptimizer(optimizer))
        try:
            yield
        finally:
            trainer.optimizer, trainer.is_fsdp_enabled = optimizer, enabled


class _Everywhere:
    """An optimiser whose state all processes ask for at once, of which Trainer asks the main one alone."""

    def __init__(self, optimizer: WholeOptimizer) -> None:
        self.state = optimizer.state_dict()
        self.load_state_dict = optimizer.load_state_dict

    def state_dict(self) -> dict[str, Any]:
        """What all of them found."""
        return self.state


def check_wrapper(plugin: Any, deepspeed: Any = None) -> None:
    """Refuse a wrapper that would flatten trained and frozen parameters into one, send parameters alone, or is DeepSpeed's.

    Raises:
        ConfigError: the message says which setting to use.
    """
    if deepspeed is not None:
        raise ConfigError(
            "weftlora train writes no checkpoints that DeepSpeed could continue from: start it with examples/accelerate-fsdp2.yaml, "
            "or use DeepSpeed in a loop of your own (docs/scaling.md says for which methods)."
        )
    if plugin is not None and getattr(plugin, "fsdp_version", 1) == 1 and not getattr(plugin, "use_orig_params", True):
        raise ConfigError(
            "FSDP1 without use_orig_params makes one parameter of a block's frozen and trained ones, which cannot be trained in "
            "part: set fsdp_version: 2, or fsdp_use_orig_params: true, in the accelerate config."
        )
    if (
        plugin is not None
        and getattr(plugin, "fsdp_version", 1) == 2
        and getattr(plugin, "cpu_ram_efficient_loading", False)
    ):
        raise ConfigError(
            "accelerate's cpu_ram_efficient_loading sends a model's parameters to the other processes and stops at the buffers that "
            "an adapter has beside them: set fsdp_cpu_ram_efficient_loading: false in the accelerate config (it is true if left out)."
        )
