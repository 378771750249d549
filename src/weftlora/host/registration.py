"""Make peft know the type WEFT, whichever of the two is imported first, and load nothing for it.

    import weftlora        announce: now if peft is there, else while peft loads, as soon as its tables stand
    the first WeftConfig   register: the tables get the config and the tuner themselves

`register_peft_method` of peft takes only names of its closed `PeftType` enum, so the enum is extended by one member. Several places
of peft and transformers read `.value` and `.name` of the type, which a real member has. Until the first config is made, a
stand-in is in the table of configs: `PeftModel.from_pretrained` finds the type in a process that has done nothing but import
weftlora, and who never uses it pays nothing. Importing never fails because of what is found here, such as a name that another
package has taken: `register` says it, where a config is made or loaded.

The card is the other shim. A process that has not imported weftlora gets a KeyError from peft, which nothing can change from
outside, so the README of every folder says it first. A card that transformers writes before a push takes its place: Trainer has
peft complete its card, and `model.push_to_hub` hands the folder to a method of its own for the upload. At both places the line is put
back. trl's trainers write a card and upload it without asking the model anything, so theirs does not have it.
"""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weftlora.adapter import before_configs
from weftlora.errors import WeftError, are_also

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "WEFT"
_PARTS = ("peft.utils.peft_types", "peft.mapping")
"""Where peft keeps the enum and the tables; both are whole long before peft is."""
_lock = threading.RLock()


def register() -> None:
    """Put WEFT into peft's types and tables. `WeftConfig` does this before it makes a config, so nobody else needs to.

    Raises:
        WeftError: another package has registered a peft type of this name, or the installed peft lacks what an adapter needs.
    """
    from peft import PeftModel, mapping
    from peft.utils import PeftType

    from weftlora.host.versions import bridge_saving, check_peft

    check_peft()  # before the tuner, which is built on what it looks for
    from weftlora.adapter.spec import WeftConfig
    from weftlora.host.tuner import PREFIX, WeftTuner

    with _lock:
        _share_errors()
        member = PeftType.__members__.get(NAME) or _extended(PeftType)
        tables = (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING)
        found = [table.get(member) for table in tables]
        if found == [WeftConfig, WeftTuner]:
            return
        if not all(entry is None or _is_ours(entry) for entry in found):
            raise WeftError(
                f"another package has already registered a peft type named {NAME}: uninstall it, or do not import both."
            )
        bridge_saving()
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] = PREFIX
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = WeftTuner
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = WeftConfig  # last: who finds it finds the others
        PeftModel.create_or_update_model_card = _with_note(PeftModel.create_or_update_model_card)
        if upload := getattr(PeftModel, "_upload_modified_files", None):
            PeftModel._upload_modified_files = _with_note(upload, before=True)


def watch() -> None:
    """Announce WEFT to peft as soon as that can be done; called by `import weftlora`."""
    before_configs.append(register)
    if not announce() and not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
        announce()  # another thread may have finished with the tables in between


def announce() -> bool:
    """Add the member and the stand-in to what peft has loaded; False while there is nothing to add them to."""
    types, mapping = map(_whole, _PARTS)
    if types is None or mapping is None:
        return False
    with _lock:
        _share_errors()
        if NAME not in types.PeftType.__members__:
            mapping.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(_extended(types.PeftType), Later)
    return True


def _share_errors() -> None:
    """Let `except peft.PeftError` catch weftlora's errors, where this peft has one (0.21)."""
    found = sys.modules.get("peft.utils.error")
    if (base := getattr(found, "PeftError", None)) is not None:
        are_also(base, getattr(found, "NoMatchingPeftModuleError", None))


def _whole(name: str) -> Any:
    """A module that has been imported to its end, or None."""
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module


def _extended(types: Any) -> Any:
    """The new member of the enum."""
    member = str.__new__(types, NAME)
    member._name_, member._value_ = NAME, NAME
    member.__objclass__, member._sort_order_ = types, len(types._member_names_)
    setattr(types, NAME, member)  # before the map: an enum refuses to set a member. Python reads this from 3.12 on
    types._member_names_.append(NAME)
    types._member_map_[NAME] = member
    types._value2member_map_[NAME] = member
    return member


def _is_ours(entry: Any) -> bool:
    """Whether a class in peft's tables is weftlora's: today's, the stand-in, or that of a module that has been imported again since.

    Notebooks and servers that reload code import weftlora a second time into a process whose peft has kept the first.
    """
    return str(getattr(entry, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _with_note(card: Any, before: bool = False) -> Any:
    """A method of PeftModel whose first argument is a folder with a model card, and for a weftlora adapter the note on how to load it.

    Args:
        card: the method.
        before: the note goes in before the method, which uploads the folder; otherwise after it, which writes the card.
    """
    from weftlora.adapter.spec import WeftConfig, write_loading_note

    def note(model: PeftModel, folder: str) -> None:
        ours = [config for config in model.peft_config.values() if isinstance(config, WeftConfig)]
        if ours:
            write_loading_note(Path(folder), sorted({name for config in ours for name in config.packages()}))

    @functools.wraps(card)
    def completed(self: PeftModel, folder: str, *args: Any, **kwargs: Any) -> Any:
        if before:
            note(self, folder)
        made = card(self, folder, *args, **kwargs)
        if not before:
            note(self, folder)
        return made

    return completed


class _Watcher:
    """Sees every import begin and finds none itself: no loader is wrapped, so no traceback has a frame of ours.

    peft imports some sixty modules after its tables stand, so it is told before its own import ends. Once that is done this does
    nothing; it stays where it is, since whoever is walking `sys.meta_path` would pass over the entry behind one that leaves.
    """

    waiting = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Nothing: the finders behind this one do the finding."""
        if self.waiting and _PARTS[1] in sys.modules and announce():
            self.waiting = False


class _Later(type):
    """A class that becomes `WeftConfig` when it is used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _config()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # a tool that looks at every class is no use of it
            raise AttributeError(name)
        return getattr(_config(), name)

    def __instancecheck__(cls, instance: Any) -> bool:
        return type(instance).__module__ == "weftlora.adapter.spec" and isinstance(instance, _config())


class Later(metaclass=_Later):
    """The config of a weftlora adapter, in peft's table until the first one is made."""


def _config() -> Any:
    register()
    from weftlora.adapter.spec import WeftConfig

    return WeftConfig
