"""Allocating LoRA (ALoRA): rank slots move from where removing them costs least to where slots are worth most.

    score of slot i = [L(M∖i) − L(M)] + [L(∅) − L({i})]        L: cross-entropy of 32 validation rows

Paper: Liu, Lyn, Zhu, Tian, Graham, "ALoRA: Allocating Low-Rank Adaptation for Fine-tuning Large Language Models",
arXiv 2403.16187 (NAACL 2024). Not Activated LoRA, which peft and vLLM call aLoRA.
Defaults: r = 8, at most 8 rounds, 32 rows (paper); the first after a third of the run, then every twelfth (ours; paper: after one
epoch, then every quarter, of at most 10); as many slots per round as a block has kinds of modules (one of two readings of the
paper); α = 2r (ours); all linear modules (paper). Where the paper is silent: see `weftlora.terms.ranks.reallocate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weftlora.settings import Time

if TYPE_CHECKING:
    from weftlora.adapter.spec import WeftConfig


def AllocLoraConfig(
    r: int = 8,
    first: Time = 1 / 3,
    every: Time = 1 / 12,
    max_rounds: int = 8,
    move: str | int = "types",
    all_lost: str = "go_on",
    scope: str = "global",
    unit: str = "ranks",
    score: str = "auto",
    terms: str = "both",
    rows: int = 32,
    resample: bool = True,
    shortlist_factor: int = 4,
    grace_rounds: int = 0,
    revive: bool = False,
    max_rank: int | None = None,
    check: bool = False,
    chunk_tokens: int | None = None,
    seed: int = 0,
    **fields: Any,
) -> WeftConfig:
    """LoRA with moving ranks; fields as in `Reallocate` and `WeftConfig` (another `structure` composes)."""
    own = dict(locals())
    del own["r"], own["fields"]
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.ranks.reallocate import Reallocate

    return WeftConfig(ranks=Reallocate(**own), r=r, **fields)
