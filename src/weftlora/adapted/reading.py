"""How a base module that is no linear module reads its input as the x of the equation.

    embedding      x is the one-hot row of a token: x Mᵀ is a look-up in M            W [vocabulary, out], M [rows, vocabulary]
    convolution    x is a patch, at every position of the output: x Mᵀ is M's convolution   W [out, in, k…], M [rows, in · k…]
    in groups      x is the patch of a group, of which every output has one                 W [out, in/g, k…], M [rows, in/g · k…]

So every structure, start and boost works on both: all of them are matrices that x is multiplied with. What a linear module has
beyond that, nodes over several modules and a dropped x that is never stored, these have not.

An adapter of a grouped convolution is one of W as that matrix: A reads the patch of any group, B has a row per output, so ΔW is a
grouped convolution too and goes into W. Stock LoRA's A reads the channels of all groups, which no grouped W can hold; with A g times,
each over the channels of one group, it computes what this one does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftlora.kernel import Work, add_read, delta_weights
from weftlora.kernel.dropout import dropped


class Reading(ABC):
    """The views that an adapted layer takes of one base module; matrices are [out, in] as in the equation."""

    def __init__(self, base: Any):
        self.base = base

    @property
    @abstractmethod
    def sides(self) -> tuple[int, int]:
        """(in, out): the columns and rows of W as a matrix."""

    @abstractmethod
    def add(self, x: Tensor, y: Tensor, work: Work) -> Tensor:
        """The base's output y with the update of x that `work` asks for."""

    @abstractmethod
    def matrix(self, weight: Tensor) -> Tensor:
        """W [out, in] of the base's weight, a view."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layout of the base's weight."""


class EmbeddingReading(Reading):
    """Of `nn.Embedding` and those that scale what it gives (`embed_scale`). Dropping a part of a token means nothing: none is done."""

    @property
    def sides(self) -> tuple[int, int]:
        return self.base.num_embeddings, self.base.embedding_dim

    def add(self, x: Tensor, y: Tensor, work: Work) -> Tensor:
        def read(matrix: Tensor, _: bool) -> Tensor:
            return F.embedding(x, matrix.to(y).T, padding_idx=self.base.padding_idx)

        scale = getattr(self.base, "embed_scale", None)
        if scale is None:
            return add_read(y, read, replace(work, dropout=0.0))
        return y + add_read(y.new_zeros(y.shape), read, replace(work, dropout=0.0)) * scale

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.T


class ConvReading(Reading):
    """Of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

    @property
    def sides(self) -> tuple[int, int]:
        return self.base.weight[0].numel(), self.base.out_channels

    def add(self, x: Tensor, y: Tensor, work: Work) -> Tensor:
        channels = -(self.base.weight.dim() - 1)  # counted from the end: a single image has no batch axis
        groups = cast(int, self.base.groups)
        x_dropped = dropped(x, work.dropout, work.mask) if work.dropout else x
        if groups > 1 and work.factors.router is None and not work.scored:
            # ΔW is small; what every slot reads of every group is r times as large as y where a group is a channel
            update = self.base._conv_forward(x_dropped, self.stored(delta_weights(work.factors, 1)[0]).to(x), None)
            return y + cast(Tensor, update).to(y.dtype)

        def read(matrix: Tensor, through_dropout: bool) -> Tensor:
            kernel = matrix.to(x).view(len(matrix), *self.base.weight.shape[1:])
            kernel = kernel if groups == 1 else torch.cat([kernel] * groups)
            seen = cast(Tensor, self.base._conv_forward(x_dropped if through_dropout else x, kernel, None))
            seen = seen.movedim(channels, -1)
            return seen if groups == 1 else seen.unflatten(-1, (groups, len(matrix)))

        return add_read(y.movedim(channels, -1), read, work, groups).movedim(-1, channels)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base.weight.shape)


def reading_of(base: nn.Module) -> Reading | None:
    """How `base` reads its input; None for a module that reads x itself, or cannot carry an adapter."""
    if isinstance(base, nn.Embedding):
        return EmbeddingReading(base)
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvReading(base)
    return None
