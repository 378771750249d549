"""The one equation of weftlora, for every token x of a site with frozen weight W.

    u = drop(x) Aᵀ          A  [R, in]     rank slots
    z = g ⊙ u               g  [R]         static gates: scale × rank mask × layer gate × tied u
    h = ω(x) ⊗ z            ω  [N]         softmax router over N heads, only where one exists; else h = z
    y = x Wᵀ + b + h B̃ᵀ     B̃ = [v ⊙ B | Ū]

A router may be asked to use only some heads per token: ω is then 0 for the others and sums to 1 over those (`Factors.top`).

`B` is [out, N·r] (head n owns columns n·r … n·r+r−1) or [out, r]; `v` scales the rows of B only. Extra slots (the
directions of Dash, the frozen −B₀A₀ of LoRA-Init) have rows in A and columns Ū in B̃ of their own, their own gates, and
no router: on a routed site they are one more head of weight 1.

Letters of the einsums: t token, i in, o out, r rank slot, n head, e extra slot.

`reference` is the equation in einsums and autograd's own derivatives. `linears` and `add_low_rank` are the same function as
one autograd node (`weftlora.kernel.node`), which every structure, Dash and the frozen slots share; what differs between
them is two matrices and f (`weftlora.kernel.factors`). `WEFT_REFERENCE=1` in the environment makes every
site use `reference`.
"""

from weftlora.kernel.dropout import draw
from weftlora.kernel.equation import reference
from weftlora.kernel.factors import AXES, Axis, Factors, Role, RouterInput, Slots, Work, delta_weight, used
from weftlora.kernel.fast_path import Linear, add_low_rank, add_read, gated_mlp, linears
from weftlora.kernel.grouped import Grouping, Order, add_grouped, delta_weights, grouped_linear
from weftlora.kernel.mixed_batch import add_by_row
from weftlora.kernel.switches import Switches, current, switched, use_reference

__all__ = [
    "AXES",
    "Axis",
    "Factors",
    "Grouping",
    "Linear",
    "Order",
    "Role",
    "RouterInput",
    "Slots",
    "Switches",
    "Work",
    "add_by_row",
    "add_grouped",
    "add_low_rank",
    "add_read",
    "current",
    "delta_weight",
    "delta_weights",
    "draw",
    "gated_mlp",
    "grouped_linear",
    "linears",
    "reference",
    "switched",
    "use_reference",
    "used",
]
