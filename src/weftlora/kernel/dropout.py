"""Dropout that keeps one bit per element, and on a GPU a seed, instead of floats.

    draw(x, p)            the bits of a mask, 1 = dropped, P(1) = p
    masked(x, bits, p)    x ⊙ (1 − bits), not scaled: 1/(1 − p) rides in a GEMM's α

On a CPU the bits are packed, eight to a byte. p is written in binary, 0.d₁d₂…d₈ plus a rest below 2⁻⁸; with random words w
(64 lanes each) Horner's rule from the last digit,

    m ← w | m  where d = 1,   w & m  where d = 0,

gives every lane a 1 with the probability that the digits say. It starts from the rest, as one bit for all lanes of a
word, 1 with the probability 2⁸ · rest. So each element is dropped with probability p to 2⁻⁵³; two elements of the same 64
are correlated by less than 1e-4 (they share an event of probability 2⁻⁸ at most), all others not at all.
Drawing takes nine random words for 64 elements; torch's own dropout on a CPU draws one for each.

Where the Triton kernels run (`weftlora.kernel.switches`), the seed is one of numbers that are counted (`weftlora.kernel.philox`), so a
kernel makes the part of a mask that it needs where it needs it, and again in the backward. p is then exact to 2⁻³².

Every mask takes one seed from torch's global CPU generator, so `torch.manual_seed`, checkpoints of the generator's state
and gradient checkpointing govern it as they do torch's own dropout. Off the CPU only that seed is kept and the mask is made
again in the backward. Under `torch.compile` both steps are opaque custom ops: traced, they took ten times as long.

Source: ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from weftlora.kernel.philox import threshold, words
from weftlora.kernel.switches import triton_runs

DIGITS = 8  # of p that are drawn per lane


def draw(x: Tensor, p: float, width: int | None = None) -> Tensor:
    """Bits of a fresh mask for x [..., in], or for as many tokens of another width, on the device of x.

    On a CPU uint8 [⌈numel/8⌉], packed; elsewhere a seed, int64 [] on the CPU. The seed of a counted mask is int64 [1].
    """
    count = x.numel() if width is None else x.shape[:-1].numel() * width
    how = count, p, triton_runs(x.device, x.dtype)
    return cast(Tensor, torch.ops.weftlora.draw_mask(x, *how)) if torch.compiler.is_compiling() else _draw(x, *how)


def is_counted(bits: Tensor) -> bool:
    """Whether these are the seed of a mask that any kernel can make a part of."""
    return bits.dtype == torch.int64 and bits.dim() == 1


def masked(x: Tensor, bits: Tensor, p: float) -> Tensor:
    """x with its dropped elements 0, the others as they are; a new tensor of x's shape, no derivative."""
    return cast(Tensor, torch.ops.weftlora.mask(x, bits, p)) if torch.compiler.is_compiling() else _masked(x, bits, p)


def dropped(x: Tensor, p: float, bits: Tensor | None = None) -> Tensor:
    """Dropout as the equation has it: x ⊙ mask / (1 − p), with autograd's derivative; draws the mask unless given."""
    with torch.no_grad():
        keep = masked(
            torch.ones_like(x, memory_format=torch.contiguous_format), draw(x, p) if bits is None else bits, p
        )
    return x * keep / (1 - p)


def _draw(x: Tensor, count: int, p: float, counted: bool = False) -> Tensor:
    seed = torch.randint(2**63 - 1, (1,) if counted else (), dtype=torch.int64, device="cpu")
    if counted or x.device.type != "cpu":
        return seed
    return torch.from_numpy(packed_bits(count, p, int(seed)))


def packed_bits(count: int, p: float, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """⌈count/8⌉ bytes whose bits are 1 with probability p, 0 ≤ p < 1."""
    words = (count + 63) // 64
    generator = np.random.Generator(np.random.SFC64(seed))
    scaled = p * 2**DIGITS
    digits = int(scaled)
    rest = scaled - digits
    lowest = (
        (digits & -digits).bit_length() - 1 if digits and not rest else 0
    )  # digits that are 0 at the end say nothing
    drawn = generator.integers(0, 2**64, size=(DIGITS - lowest + bool(rest), words), dtype=np.uint64)
    if rest:
        bits = np.where(drawn[-1] < np.uint64(int(rest * 2**64)), np.uint64(2**64 - 1), np.uint64(0))
    else:
        bits = np.zeros(words, dtype=np.uint64)
    for place, random in zip(range(lowest, DIGITS), drawn, strict=False):
        np.bitwise_or(bits, random, out=bits) if digits >> place & 1 else np.bitwise_and(bits, random, out=bits)
    return bits.view(np.uint8)[: (count + 7) // 8]


def _masked(x: Tensor, bits: Tensor, p: float) -> Tensor:
    if is_counted(bits):
        if triton_runs(x.device, x.dtype):
            from weftlora.kernel.triton.launches import masked_by_count

            return masked_by_count(x, int(bits), p)
        drawn = words(int(bits), x.shape[:-1].numel(), x.shape[-1], x.device)
        return torch.where((drawn >= threshold(p)).view(x.shape), x, torch.zeros_like(x))
    if x.device.type != "cpu":
        generator = torch.Generator(x.device).manual_seed(int(bits))
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # not as x: its strides would decide who is dropped
        return x * keep.bernoulli_(1 - p, generator=generator)
    if not x.is_contiguous():
        x = x.contiguous()
    if x.numel() % 8:
        return _masked_ragged(x, bits)
    lanes = _table(x.element_size()).take(bits.numpy(), axis=0)  # ones in every bit of what is kept
    return torch.from_numpy(lanes).view(-1).bitwise_and_(x.view(-1).view(torch.int64)).view(x.dtype).view(x.shape)


def _masked_ragged(x: Tensor, bits: Tensor) -> Tensor:
    """As `_masked` where the last byte of bits is not used in full."""
    flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 8))
    return _masked(flat, bits, 0.0)[: x.numel()].view(x.shape)


@lru_cache
def _table(size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[256, size] int64: for a byte of bits the 8 lanes of `size` bytes each, all ones where its bit is 0."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.repeat(np.where(bits, 0, 255).astype(np.uint8), size, axis=1).view(np.int64)


@torch.library.custom_op("weftlora::draw_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _draw_op(x: Tensor, count: int, p: float, counted: bool) -> Tensor:
    return _draw(x, count, p, counted)


@_draw_op.register_fake
def _(x: Tensor, count: int, p: float, counted: bool) -> Tensor:
    if counted or x.device.type != "cpu":
        return torch.empty((1,) if counted else (), dtype=torch.int64, device="cpu")
    return torch.empty((count + 7) // 8, dtype=torch.uint8, device="cpu")


@torch.library.custom_op("weftlora::mask", mutates_args=())
def _mask_op(x: Tensor, bits: Tensor, p: float) -> Tensor:
    return _masked(x, bits, p)


@_mask_op.register_fake
def _(x: Tensor, bits: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
