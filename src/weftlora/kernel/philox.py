"""Random numbers that are counted, not drawn one after the other: any of them can be had alone, again and anywhere.

With Philox4x32 of 7 rounds, whose key of 64 bits is a mask's seed,

    element i of token t is dropped  ⇔  word i mod 4 of philox(t, ⌊i/4⌋, 0, 0) < 2³² p

Here in torch, on any device: what the Triton kernels are held against, and what is used where one of their masks is needed and
no kernel of theirs runs.

Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); 7 rounds are the fewest that passed
BigCrush there.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
WORD = 2**32


def words(seed: int, tokens: int, width: int, device: torch.device | str = "cpu", rounds: int = ROUNDS) -> Tensor:
    """The numbers of a counted mask, [tokens, width] int64 below 2³²; nothing of Triton, for where its kernels are not asked."""
    columns = (width + 3) // 4
    c0 = torch.arange(tokens, device=device)[:, None].expand(tokens, columns)
    c1 = torch.arange(columns, device=device)[None, :].expand(tokens, columns)
    return torch.stack(philox((c0, c1, 0 * c0, 0 * c0), seed, rounds), 2).flatten(1)[:, :width]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int, rounds: int) -> tuple[Tensor, ...]:
    """Philox4x32: four words for a counter of four, int64 below 2³² each, and a key of 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % WORD, key // WORD
    for _ in range(rounds):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # that they overflow changes none of their 64 bits
        c0, c1, c2, c3 = (b >> 32) % WORD ^ c1 ^ k0, b % WORD, (a >> 32) % WORD ^ c3 ^ k1, a % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """Below which number an element is dropped."""
    return min(round(p * WORD), WORD - 1)
