"""weftlora: adaptive low-rank adapters as one equation with five axes, plugged into peft.

Importing weftlora makes the type WEFT known to peft, before or after peft itself is imported, so that `get_peft_model`,
`PeftModel.from_pretrained`, Trainer and trl work with its configs. It loads neither peft nor torch: every name below is loaded when
it is first used.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

from weftlora.errors import (
    AdapterError,
    ApartError,
    CombinationError,
    ConfigError,
    DataError,
    DivergedError,
    MergeError,
    MissingExtraError,
    ModelError,
    NoMatchError,
    RunError,
    TargetError,
    WeftError,
)
from weftlora.host.registration import register as register  # of no use to users: peft is told by itself
from weftlora.host.registration import watch as _watch
from weftlora.settings import epochs
from weftlora.version import __version__ as __version__

if TYPE_CHECKING:
    from weftlora.adapted.routing import Routing, routing
    from weftlora.adapter.spec import WeftConfig
    from weftlora.auto import auto
    from weftlora.compare import compare
    from weftlora.data.suggest_heads import suggest_heads
    from weftlora.export import export_lora, merge, push
    from weftlora.host.attach import attach, load_state_dict, state_dict
    from weftlora.host.hotswap import hotswap
    from weftlora.host.optimizer import param_groups
    from weftlora.host.released_code import import_hydralora, import_lora_dash
    from weftlora.host.weighted import rescale_adapter_scale
    from weftlora.inspection.directions import directions
    from weftlora.inspection.inspecting import inspect
    from weftlora.recipes import (
        AllocLoraConfig,
        FlexoraConfig,
        HydraLoraConfig,
        LoraDashConfig,
        LoraInitConfig,
        LoraTsdConfig,
        PlainLoraConfig,
        TiedLoraConfig,
    )
    from weftlora.report import report
    from weftlora.search import Selection, search_layers, second_stage
    from weftlora.terms.boost.dash import Dash
    from weftlora.terms.layers.every import All
    from weftlora.terms.layers.only import Only
    from weftlora.terms.layers.search import Search
    from weftlora.terms.ranks.reallocate import Reallocate
    from weftlora.terms.ranks.uniform import Uniform
    from weftlora.terms.start.directions import Directions
    from weftlora.terms.start.kaiming import Kaiming
    from weftlora.terms.structure.hydra import Hydra
    from weftlora.terms.structure.plain import Plain
    from weftlora.terms.structure.tied import Tied
    from weftlora.terms.trust import trust_terms
    from weftlora.train import Run, chat, evaluate, generate, preview, train
    from weftlora.train.callback import Callback

_LAZY = {
    "auto": "weftlora.auto",
    "compare": "weftlora.compare",
    **dict.fromkeys(("export_lora", "merge", "push"), "weftlora.export"),
    **dict.fromkeys(("attach", "load_state_dict", "state_dict"), "weftlora.host.attach"),
    **dict.fromkeys(("import_hydralora", "import_lora_dash"), "weftlora.host.released_code"),
    "param_groups": "weftlora.host.optimizer",
    "hotswap": "weftlora.host.hotswap",
    "rescale_adapter_scale": "weftlora.host.weighted",
    **dict.fromkeys(("Routing", "routing"), "weftlora.adapted.routing"),
    **dict.fromkeys(("AllocLoraConfig", "FlexoraConfig", "HydraLoraConfig", "LoraDashConfig"), "weftlora.recipes"),
    **dict.fromkeys(("LoraInitConfig", "LoraTsdConfig", "PlainLoraConfig", "TiedLoraConfig"), "weftlora.recipes"),
    "report": "weftlora.report",
    "suggest_heads": "weftlora.data.suggest_heads",
    "inspect": "weftlora.inspection.inspecting",
    **dict.fromkeys(("Selection", "search_layers", "second_stage"), "weftlora.search"),
    "WeftConfig": "weftlora.adapter.spec",
    "Dash": "weftlora.terms.boost.dash",
    "All": "weftlora.terms.layers.every",
    "Only": "weftlora.terms.layers.only",
    "Search": "weftlora.terms.layers.search",
    "Reallocate": "weftlora.terms.ranks.reallocate",
    "Uniform": "weftlora.terms.ranks.uniform",
    "Directions": "weftlora.terms.start.directions",
    "Kaiming": "weftlora.terms.start.kaiming",
    "Hydra": "weftlora.terms.structure.hydra",
    "Plain": "weftlora.terms.structure.plain",
    "Tied": "weftlora.terms.structure.tied",
    "trust_terms": "weftlora.terms.trust",
    **dict.fromkeys(("Run", "chat", "evaluate", "generate", "preview", "train"), "weftlora.train"),
    "Callback": "weftlora.train.callback",
    "directions": "weftlora.inspection.directions",
}
"""Public name → the module it is loaded from when it is first used."""

__all__ = [
    "AdapterError",
    "All",
    "AllocLoraConfig",
    "ApartError",
    "Callback",
    "CombinationError",
    "ConfigError",
    "Dash",
    "DataError",
    "Directions",
    "DivergedError",
    "FlexoraConfig",
    "Hydra",
    "HydraLoraConfig",
    "Kaiming",
    "LoraDashConfig",
    "LoraInitConfig",
    "LoraTsdConfig",
    "MergeError",
    "MissingExtraError",
    "ModelError",
    "NoMatchError",
    "Only",
    "Plain",
    "PlainLoraConfig",
    "Reallocate",
    "Routing",
    "Run",
    "RunError",
    "Search",
    "Selection",
    "TargetError",
    "Tied",
    "TiedLoraConfig",
    "Uniform",
    "WeftConfig",
    "WeftError",
    "attach",
    "auto",
    "chat",
    "compare",
    "directions",
    "epochs",
    "evaluate",
    "export_lora",
    "generate",
    "hotswap",
    "import_hydralora",
    "import_lora_dash",
    "inspect",
    "load_state_dict",
    "merge",
    "param_groups",
    "preview",
    "push",
    "report",
    "rescale_adapter_scale",
    "routing",
    "search_layers",
    "second_stage",
    "state_dict",
    "suggest_heads",
    "train",
    "trust_terms",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'weftlora' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    # a package that can be called is what its name says
    value = module if module.__name__ == f"weftlora.{name}" else getattr(module, name)
    globals()[name] = value
    if name == "WeftConfig":
        with contextlib.suppress(WeftError):  # whoever makes a config is told
            register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


_watch()
