"""weft: adaptive low-rank adapters as one equation with five axes, plugged into peft.

Importing weft registers the type WEFT with peft, so that `get_peft_model`, `PeftModel.from_pretrained`, Trainer and trl
work with its configs; it loads nothing beyond what `import peft` loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.errors import (
    AdapterError,
    CombinationError,
    ConfigError,
    DataError,
    DivergedError,
    MergeError,
    ModelError,
    RunError,
    TargetError,
    WeftError,
)

__version__ = "0.1.0.dev0"

from weft.glue.attach import attach, load_state_dict, param_groups, state_dict
from weft.glue.official import import_hydralora, import_lora_dash
from weft.glue.register import register
from weft.glue.routing import Routing, routing
from weft.recipes import (
    AllocLoraConfig,
    FlexoraConfig,
    HydraLoraConfig,
    LoraDashConfig,
    LoraInitConfig,
    LoraTsdConfig,
    PlainLoraConfig,
    TiedLoraConfig,
)
from weft.spec import WeftConfig
from weft.terms.boost.dash import Dash
from weft.terms.layers.every import All
from weft.terms.layers.only import Only
from weft.terms.layers.search import Search
from weft.terms.ranks.reallocate import Reallocate
from weft.terms.ranks.uniform import Uniform
from weft.terms.start.directions import Directions
from weft.terms.start.kaiming import Kaiming
from weft.terms.structure.hydra import Hydra
from weft.terms.structure.plain import Plain
from weft.terms.structure.tied import Tied
from weft.times import epochs

register()

if TYPE_CHECKING:
    from weft.compare import compare
    from weft.export import export_lora, merge
    from weft.report import report
    from weft.report.heads import suggest_heads
    from weft.report.inspecting import inspect
    from weft.search import Selection, search_layers, second_stage
    from weft.train import Run, evaluate, generate, train
    from weft.train.callback import Callback
    from weft.train.directions import directions

_LAZY = {
    "compare": "weft.compare",
    **dict.fromkeys(("export_lora", "merge"), "weft.export"),
    **dict.fromkeys(("Selection", "search_layers", "second_stage"), "weft.search"),
    **dict.fromkeys(("Run", "evaluate", "generate", "train"), "weft.train"),
    "Callback": "weft.train.callback",
    "directions": "weft.train.directions",
    "inspect": "weft.report.inspecting",
    "report": "weft.report",
    "suggest_heads": "weft.report.heads",
}

__all__ = [
    "AdapterError",
    "All",
    "AllocLoraConfig",
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
    "ModelError",
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
    "compare",
    "directions",
    "epochs",
    "evaluate",
    "export_lora",
    "generate",
    "import_hydralora",
    "import_lora_dash",
    "inspect",
    "load_state_dict",
    "merge",
    "param_groups",
    "report",
    "routing",
    "search_layers",
    "second_stage",
    "state_dict",
    "suggest_heads",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # the training stack loads transformers models and trl: only when asked for
        module = importlib.import_module(_LAZY[name])
        return module if module.__name__ == f"weft.{name}" else getattr(module, name)  # a package that can be called
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
