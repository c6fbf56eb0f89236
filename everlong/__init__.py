"""everlong: efficient sequence models, from raw data to a served model, on the machine that you have."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlong.generate.decode import generate
    from everlong.models.lm import LanguageModel, ModelConfig
    from everlong.models.run import load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "ModelConfig", "__version__", "generate", "load"]

_PLACES = {
    "LanguageModel": "everlong.models.lm",
    "ModelConfig": "everlong.models.lm",
    "load": "everlong.models.run",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in {"generate", "mixers", "ops"}:
        return importlib.import_module(f"everlong.{name}")
    raise AttributeError(f"module 'everlong' has no attribute {name!r}")
