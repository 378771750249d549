"""Whether the tensors of a file are those of an adapter: the sentence for those that are not, and what may differ.

peft's hook for loading (`WeftTuner._remap_adapter_state_dict_for_load`) asks here where it has one, and what stands in for it in
older versions (`weftlora.host.versions`) does too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from weftlora.errors import AdapterError

if TYPE_CHECKING:  # `doctor` gets here where torch is not installed
    from torch import Tensor

SITE = ".weft_site."

passing_over_sizes: ContextVar[bool] = ContextVar("passing_over_sizes", default=False)
"""Whether the adapter that is being loaded keeps its own values where the file's have another size (`ignore_mismatched_sizes`)."""


class OtherShape(NamedTuple):
    """A tensor of a file that has another shape here."""

    key: str
    theirs: tuple[int, ...]
    ours: tuple[int, ...]

    @property
    def ranks(self) -> tuple[str, int, int] | None:
        """(module, rank in the file, rank here) where this is an A that differs in its rank alone."""
        module, _, part = self.key.partition(SITE)
        if (
            not part.endswith("structure.A")
            or {len(self.theirs), len(self.ours)} != {2}
            or self.theirs[1] != self.ours[1]
        ):
            return None
        return module, self.theirs[0], self.ours[0]


def tensor_mismatch(extra: list[str], missing: list[str], wrong: list[OtherShape]) -> AdapterError:
    """The error for a file whose tensors are not this adapter's: some too many, some missing, some of another shape."""
    ranks = [each.ranks for each in wrong if each.ranks is not None]
    if ranks and not (extra or missing):
        module, theirs, ours = ranks[0]
        return AdapterError(
            f"the file's adapter has rank {theirs} at {module} and this one has {ours}: make it with r={theirs}, or with the "
            "config in the file's folder, as PeftModel.from_pretrained does."
        )
    problem = (
        (f"the file has {len(extra)} tensors this model has no place for, such as {extra[0]}" if extra else "")
        or (f"the file lacks {len(missing)} tensors, such as {missing[0]}" if missing else "")
        or f"{len(wrong)} tensors have another shape, such as {wrong[0].key}: file {wrong[0].theirs}, model {wrong[0].ours}"
    )
    return AdapterError(
        f"the adapter was not made for this base model: {problem}; load it onto the base it was trained on."
    )


def count_on_first_site(mapped: dict[str, Tensor], expected: Iterable[str], suffix: str) -> dict[str, Tensor]:
    """The adapter's one step count under the name of this model's first site: converted files may not know which that is."""
    [*wanted] = (key for key in expected if key.endswith(suffix))
    [*found] = (key for key in mapped if key.endswith((suffix, f"{SITE}steps")))  # peft names known keys only
    if len(wanted) == len(found) == 1 and wanted != found:
        return {wanted[0] if key == found[0] else key: value for key, value in mapped.items()}
    return mapped
