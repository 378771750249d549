"""The loss on answer tokens without the logits of all others.

    loss = − Σ_t log softmax(W h_t)[y_t] / n        over the n positions that are learnt, a few at a time
    ∂loss/∂h_t = Wᵀ (softmax(W h_t) − 1[y_t]) / n

A large vocabulary makes the output layer W [vocabulary, hidden] the largest product of a small model, and its logits in float32 the
largest tensors by far: five copies of tokens × vocabulary between forward and backward. Prompts and padding need none of them, and
where W is frozen the gradient of h is all that is kept. Logits and softmax are in float32, as transformers has them, so the result is
the same up to the order of sums.

The model itself is called, with everything around it (peft, hooks, data parallel); only its output layer hands its input through. A
model that bounds its logits, or adds to its loss, computes its loss itself; it is found by its config, or by comparing once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from weftlora.adapted.hooks import in_mode, watched
from weftlora.settings import IGNORE

CHUNK = 256
"""Positions at a time: 50 MB of logits at a vocabulary of 49,152."""
WORTH = 8192
"""Rows of an output layer below which nothing is to be gained."""
PROBED, CLOSE = 16, 1e-2
"""Tokens of the comparison with the model's own loss, and how far it may be off, relative: bfloat16 sums in another order."""


class _HeadLoss(torch.autograd.Function):
    """Σ −log p of labels [n] for hidden [n, d] under W [v, d]; what is kept for the backward is the gradient of hidden."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[0]
        total, grads = hidden.new_zeros((), dtype=torch.float32), []
        for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
            logits = nn.functional.linear(h, weight, bias).float()
            log_p = logits.log_softmax(-1)
            total -= log_p.gather(-1, y[:, None]).sum()
            if needed:
                p = log_p.exp_()
                p.scatter_add_(-1, y[:, None], p.new_full((len(y), 1), -1.0))
                grads.append(p.to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(grads) if grads else hidden.new_zeros(hidden.shape))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (kept,) = ctx.saved_tensors
        return (kept * grad).to(kept.dtype), None, None, None


def head_of(model: Any) -> nn.Linear | None:
    """The output layer of a causal model whose loss can be computed so: a plain, frozen linear with many rows; else None."""
    settings = model.config.get_text_config()
    if settings.is_encoder_decoder or getattr(settings, "final_logit_softcapping", None) is not None:
        return None
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or head.weight.is_meta or len(head.weight) < WORTH:
        return None
    return None if watched(head) else head


@contextmanager
def _handing_through(head: nn.Linear) -> Iterator[None]:
    """The output layer gives its input back."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward


def answer_loss(model: Any, head: nn.Linear, inputs: dict[str, Any]) -> tuple[Tensor, int, Any]:
    """Σ −log p over the learnt tokens of a batch, how many they are, and the model's output, whose `logits` are None.

    Args:
        model: what to call, the base itself or whatever is around it.
        inputs: input_ids, labels [batch, time] and what else the model takes.
    """
    labels = inputs["labels"][:, 1:]
    with _handing_through(head):
        output = model(**{key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")})
    hidden, output["logits"] = output.logits, None
    learnt = labels.ne(IGNORE)
    total = _HeadLoss.apply(hidden[:, :-1][learnt], head.weight, head.bias, labels[learnt])
    return total, int(learnt.sum()), output


def is_the_models_own(model: Any, head: nn.Linear) -> bool:
    """Whether the model's own loss is this one, asked on a few tokens."""
    device = head.weight.device
    ids = (torch.arange(PROBED, device=device)[None] * 7 + 3) % len(head.weight)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with in_mode(model, training=False), torch.no_grad():
        own = float(model(**given).loss)
        total, count, _ = answer_loss(model, head, given)
    return abs(float(total) / count - own) <= CLOSE * abs(own)
