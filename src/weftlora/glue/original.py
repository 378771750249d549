"""Single matrices out of a checkpoint folder, by module name: never the whole model.

Two things need them: ranking directions on the original W where the base in memory is quantised (its noise owns the small
end of the spectrum, where task-specific directions lie), and comparing with a model that was fine-tuned in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from weftlora.errors import ModelError
from weftlora.glue.layer import WeftLinear

FAR = 0.7
"""‖W in memory − W in the file‖ / ‖W in the file‖ above which the file is of another model; four bits leave about 0.1."""


class Checkpoint:
    """The weights in the safetensors files of a folder.

    Raises:
        ModelError: no such folder, no safetensors files in it, or a damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        files = sorted(p for p in self.folder.glob("*.safetensors") if not p.name.startswith("adapter_"))
        if not files:
            raise ModelError(f"{folder} has no model weights: give a folder with the *.safetensors files of a model.")
        self.where: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, "pt") as file:
                    self.where.update(dict.fromkeys(file.keys(), path))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path} cannot be read: {error}.") from None

    def key(self, module: str) -> str:
        """The name of the weight of `module` in the files, which may lack or add the name of the whole model in front.

        Raises:
            ModelError: no weight of that name, or several.
        """
        wanted = f"{module}.weight"
        if wanted in self.where:
            return wanted
        near = [key for key in self.where if wanted.endswith(f".{key}") or key.endswith(f".{wanted}")]
        if len(near) != 1:
            found = f"several ({', '.join(sorted(near)[:3])})" if near else "none"
            raise ModelError(
                f"{self.folder} should have one weight for {module}, but has {found}: give the same model."
            )
        return near[0]

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of the weight of `module` as it is stored; nothing but the file's header is read."""
        key = self.key(module)
        with safe_open(self.where[key], "pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, module: str) -> Tensor:
        """The weight of `module` as it is stored, on the CPU."""
        key = self.key(module)
        with safe_open(self.where[key], "pt") as file:
            return cast(Tensor, file.get_tensor(key))


@dataclass(frozen=True)
class OriginalWeight:
    """Reads W [out, in] of one adapted module from a checkpoint, on the device of the module.

    Raises:
        ModelError: the checkpoint has no such matrix.
    """

    layer: WeftLinear
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        base = self.layer.get_base_layer()
        wanted = tuple(base.weight.shape) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
        if (found := self.checkpoint.shape(self.layer.module_name)) != wanted:
            raise ModelError(
                f"{self.layer.module_name} is {list(found)} in {self.checkpoint.folder} and {list(wanted)} in the model: give "
                "the checkpoint that this base was made from."
            )

    def __call__(self) -> Tensor:
        """W [out, in] in the checkpoint's dtype.

        Raises:
            ModelError: it is not near the W in memory, so it is another model's.
        """
        here = self.layer.base_matrix()
        stored = self.checkpoint.read(self.layer.module_name).to(here.device)
        w = stored.T if isinstance(self.layer.get_base_layer(), Conv1D) else stored
        far = torch.dist(w.float(), here.float()) / w.float().norm()
        if not far < FAR:
            raise ModelError(
                f"{self.layer.module_name} in {self.checkpoint.folder} differs from the weight in memory by {far:.0%}: give the "
                "checkpoint that this base was made from."
            )
        return w
