"""What a narrower number format leaves of an update.

    lost = ‖(round(W + ΔW) − round(W)) − ΔW‖_F / ‖ΔW‖_F

0 keeps all of it, 1 is as far off as no update at all, and above 1 the noise of rounding is larger than the update. Where W is
stored in the format itself, an update below half a step is gone entirely (round(W + ΔW) = W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The 16 values of NF4: quantiles of a normal distribution scaled to [−1, 1], with an exact zero.
# Source: QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64


def round_nf4(w: Tensor) -> Tensor:
    """W after NF4 in blocks of 64 with fp32 block maxima, fp32: what 4 bits keep (without double quantisation)."""
    flat = w.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    values = torch.tensor(NF4, device=w.device)
    nearest = torch.bucketize(blocks / largest, (values[1:] + values[:-1]) / 2)
    return (values[nearest] * largest).flatten()[: len(flat)].view_as(w)


def kept_by(dtype: torch.dtype, w: Tensor, delta: Tensor) -> Tensor:
    """The update that is left when both W + ΔW and W are rounded to `dtype`, fp64."""
    w64, delta64 = w.double(), delta.double()
    return (w64 + delta64).float().to(dtype).double() - w64.float().to(dtype).double()


def kept_by_nf4(w: Tensor, delta: Tensor) -> Tensor:
    """The update that is left in NF4, fp64."""
    return (round_nf4(w.float() + delta.float()) - round_nf4(w)).double()
