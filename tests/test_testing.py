"""The door is no formality: every part of the contract is broken by one term here, and `check_term` says which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import weftlora
from weftlora.terms import registry
from weftlora.terms.structure import OutsideTerm
from weftlora.terms.structure.plain import PlainTerm
from weftlora.testing import Checked, check_processes, check_term

pytestmark = pytest.mark.sharded


@pytest.fixture(autouse=True)
def _own_classes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_local", {})


def checked(term: Any, **more: Any) -> Checked:
    return check_term(term, processes=False, **more)


@dataclass(frozen=True)
class Sound(weftlora.Plain):
    """Plain LoRA, whose site a test may change."""

    def build(self, size, room, owners, draw):
        """One `site` makes."""
        return self.site(size, draw(size.r, size.fan_in))

    def site(self, size, a):
        """As Plain has it."""
        return PlainTerm(a, size.out)


def test_a_sound_term_passes_and_says_what_was_held() -> None:
    found = checked(Sound())
    assert found.term == "sound"
    assert found.axis == "structure"
    assert {"identity at the start", "training", "reference", "saving", "resuming", "merging", "export"} <= {
        *found.held
    }
    assert found.notes == {}


def test_an_update_at_the_start_is_found() -> None:
    @dataclass(frozen=True)
    class Loud(Sound):
        """B is not zero."""

        def site(self, size, a):
            term = PlainTerm(a, size.out)
            nn.init.normal_(term.B)
            return term

    with pytest.raises(AssertionError, match="Loud, identity at the start: a fresh adapter does not compute"):
        checked(Loud())


def test_a_parameter_that_nothing_reaches_is_found() -> None:
    class Idle(PlainTerm):
        def __init__(self, a, out):
            super().__init__(a, out)
            self.unused = nn.Parameter(torch.ones(2))

    @dataclass(frozen=True)
    class Lazy(Sound):
        """It has a parameter too many."""

        def site(self, size, a):
            return Idle(a, size.out)

    with pytest.raises(AssertionError, match=r"Lazy, training: no gradient reaches .*unused"):
        checked(Lazy())


def test_a_tensor_that_is_not_saved_is_found() -> None:
    class Forgetful(PlainTerm):
        def __init__(self, a, out):
            super().__init__(a, out)
            self.register_buffer("noise", 1 + torch.rand(a.shape[1]), persistent=False)

        def factors(self, scale):
            f = super().factors(scale)
            return replace(f, A=f.A * self.noise)

    @dataclass(frozen=True)
    class Drawn(Sound):
        """What it draws is not in the file."""

        def site(self, size, a):
            return Forgetful(a, size.out)

    with pytest.raises(AssertionError, match=r"Drawn, saving: PeftModel\.from_pretrained gives other logits"):
        checked(Drawn())


def test_a_tensor_that_it_does_not_name_is_found() -> None:
    class Wider(PlainTerm):
        def __init__(self, a, out):
            super().__init__(a, out)
            self.register_buffer("seen", torch.zeros(()))

    @dataclass(frozen=True)
    class Quiet(Sound):
        """One buffer more than it says."""

        def site(self, size, a):
            return Wider(a, size.out)

    with pytest.raises(AssertionError, match=r"Quiet, saving: its sites keep A, B, seen, and it says A, B of A, B"):
        checked(Quiet())


def test_an_update_that_nobody_would_call_is_found() -> None:
    class Beside(OutsideTerm):
        def __init__(self, choice, a, out):
            super().__init__()
            self.choice, self.A, self.B = choice, nn.Parameter(a), nn.Parameter(a.new_zeros(out, a.shape[0]))

        factors, by_slot, linear, fix = PlainTerm.factors, PlainTerm.by_slot, PlainTerm.linear, PlainTerm.fix

        def update(self, x, dropped, scale):
            return scale * dropped @ self.A.T @ self.B.T

    @dataclass(frozen=True)
    class Unsaid(Sound):
        """Its sites have an update of their own, which it does not say."""

        def site(self, size, a):
            return Beside(self, a, size.out)

    with pytest.raises(AssertionError, match="write outside = True"):
        checked(Unsaid())


def test_a_headline_of_no_field_is_found() -> None:
    @dataclass(frozen=True)
    class Headed(Sound):
        """Its line about the adapter cannot be written."""

        headline: ClassVar[tuple[str, ...] | None] = ("width",)

    with pytest.raises(AssertionError, match="its headline names a field that it does not have"):
        checked(Headed())


class Doubling:
    """After step 3 the rows of A double, once; whether they have is remembered in Python, or in a buffer."""

    what = "the doubling"

    def __init__(self, timeline: Any, safe: bool, due: int = 3):
        self.sites = [member.site for member in timeline.members]
        self.safe, self.at, self.seen = safe, due, 0
        if safe:
            self.sites[0].register_counter("doubled", torch.zeros((), dtype=torch.bool))

    def due(self, length: Any) -> int:
        return self.at

    def done(self) -> bool:
        return bool(self.sites[0].doubled) if self.safe else self.seen > 0

    def check(self, length: Any) -> None:
        pass

    def before_step(self, step: Any, length: Any) -> None:
        pass

    def take_rows(self, rows: Any) -> bool:
        return False

    def plan(self, step: int, length: Any, optimizer: Any) -> Any:
        return self.apply if step >= self.at else None

    def apply(self) -> dict[str, Any]:
        for site in self.sites:
            site.structure.A.data.mul_(2)
        self.seen += 1
        if self.safe:
            self.sites[0].doubled.fill_(True)
        return {"event": "doubled"}


@dataclass(frozen=True)
class Doubled(Sound):
    """An event whose memory survives a restart where it is safe."""

    counts: ClassVar[Mapping[str, str]] = {"doubled": "whether it has happened"}
    safe: bool = True
    at: int = 3

    def controllers(self, timeline):
        """The doubling."""
        return [Doubling(timeline, self.safe, self.at)]


def test_a_memory_outside_of_buffers_is_found() -> None:
    assert checked(Doubled()).notes["events"] == "doubled"
    with pytest.raises(AssertionError, match="resuming: a run that was stopped after step 4 and continued ends with"):
        checked(Doubled(safe=False))


def test_an_event_that_does_not_come_is_found() -> None:
    with pytest.raises(AssertionError, match="training: the doubling has not happened in 8 steps"):
        checked(Doubled(at=20))


def test_a_field_that_json_changes_is_found() -> None:
    @dataclass(frozen=True)
    class Tupled(Sound):
        """A tuple comes back as a list."""

        sizes: tuple[int, ...] = (1, 2)

    with pytest.raises(AssertionError, match="as another term"):
        checked(Tupled())


def test_a_term_without_a_word_about_itself_is_found() -> None:
    @dataclass(frozen=True)
    class Silent(Sound):
        pass

    with pytest.raises(AssertionError, match="says nothing of itself"):
        checked(Silent())


def test_an_export_of_another_function_is_found() -> None:
    class Shifty(PlainTerm):
        def factors(self, scale: float) -> Any:
            f = super().factors(scale)
            return f if self.training or torch.is_grad_enabled() else replace(f, B=f.B * 1.5)

    @dataclass(frozen=True)
    class Shifted(Sound):
        """Its letters depend on who asks."""

        def site(self, size, a):
            return Shifty(a, size.out)

    with pytest.raises(AssertionError, match=r"Shifted, (reference|merging|export|saving)"):
        checked(Shifted())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no page"),
        ("# Another\n```text\ny\n```", "does not say how to write the term: Sound"),
        ("# Sound", "neither the equation nor an example"),
        ("# Sound\n```text\ny\n```\nTODO: the source", "line 5 is still to be filled in"),
    ],
)
def test_a_page_that_is_not_written_is_found(tmp_path: Path, text: str | None, said: str) -> None:
    page = tmp_path / "sound.md"
    if text is not None:
        page.write_text(text)
    with pytest.raises(AssertionError, match=said):
        checked(Sound(), card=page)


def test_a_class_that_no_other_process_can_import_is_said() -> None:
    @dataclass(frozen=True)
    class Hidden(Sound):
        """A class inside a function."""

    with pytest.raises(AssertionError, match="put its class into a module of its own"):
        check_processes([Hidden()])


def test_what_is_no_choice_is_refused() -> None:
    with pytest.raises(weftlora.ConfigError, match="is not a choice of any axis"):
        checked(3)


def test_processes_that_draw_differently_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = '''
from dataclasses import dataclass
import os
import torch
import weftlora
from weftlora.terms.structure.plain import PlainTerm


class Site(PlainTerm):
    def factors(self, scale):
        return super().factors(scale * (1 + int(os.environ.get("RANK", "0"))))


@dataclass(frozen=True)
class Ranked(weftlora.Plain):
    """Each process has a scale of its own."""

    def build(self, size, room, owners, draw):
        return Site(draw(size.r, size.fan_in), size.out)
'''
    (tmp_path / "ranked_term.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import ranked_term

    with pytest.raises(AssertionError, match=r"Ranked, two processes: in process \d "):
        check_processes([ranked_term.Ranked()])
