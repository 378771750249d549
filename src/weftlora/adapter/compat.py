"""Which choices do not go together, as they say it themselves: one table feeds the check, the error, the documentation and the
grid test.

A row names two choices and the reason to show. Rows go away as combinations are made to work.
"""

from __future__ import annotations

from weftlora.errors import CombinationError
from weftlora.terms.axes import builtin, refusals
from weftlora.terms.choice import Choice

REFUSED: dict[tuple[str, str], str] = refusals(builtin())


def check(*choices: Choice | None) -> None:
    """Raise `CombinationError` if two of the choices do not go together."""
    given = [choice for choice in choices if choice is not None]
    names = [choice.title for choice in given]
    own = {(one.title, other): reason for one in given for other, reason in one.objections.items()}
    for (one, other), reason in (REFUSED | refusals(map(type, given)) | own).items():
        if one in names and other in names:
            raise CombinationError(f"{one} with {other}: {reason}. Drop one of the two, or see docs/composing.md.")
