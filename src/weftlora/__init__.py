"""weftlora: adaptive low-rank adapters as one equation with five axes, plugged into peft.

Importing weftlora registers the type WEFT with peft, so that `get_peft_model`, `PeftModel.from_pretrained`, Trainer and trl
work with its configs; it loads nothing beyond what `import peft` loads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weftlora.errors import (
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

from weftlora.glue.attach import attach, load_state_dict, param_groups, state_dict
from weftlora.glue.official import import_hydralora, import_lora_dash
from weftlora.glue.register import register
from weftlora.glue.routing import Routing, routing
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
from weftlora.spec import WeftConfig
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
from weftlora.times import epochs

register()

if TYPE_CHECKING:
    from weftlora.compare import compare
    from weftlora.export import export_lora, merge
    from weftlora.report import report
    from weftlora.report.heads import suggest_heads
    from weftlora.report.inspecting import inspect
    from weftlora.search import Selection, search_layers, second_stage
    from weftlora.train import Run, evaluate, generate, train
    from weftlora.train.callback import Callback
    from weftlora.train.directions import directions

_LAZY = {
    "compare": "weftlora.compare",
    **dict.fromkeys(("export_lora", "merge"), "weftlora.export"),
    **dict.fromkeys(("Selection", "search_layers", "second_stage"), "weftlora.search"),
    **dict.fromkeys(("Run", "evaluate", "generate", "train"), "weftlora.train"),
    "Callback": "weftlora.train.callback",
    "directions": "weftlora.train.directions",
    "inspect": "weftlora.report.inspecting",
    "report": "weftlora.report",
    "suggest_heads": "weftlora.report.heads",
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
    "trust_terms",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # the training stack loads transformers models and trl: only when asked for
        module = importlib.import_module(_LAZY[name])
        return (
            module if module.__name__ == f"weftlora.{name}" else getattr(module, name)
        )  # a package that can be called
    raise AttributeError(f"module 'weftlora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
