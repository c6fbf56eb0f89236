"""Generation. The package itself can be called: `everlong.generate(model, prompt_tokens)` is `decode.generate`."""

import sys
from types import ModuleType

from everlong.generate.decode import generate

__all__ = ["generate"]


class _Callable(ModuleType):
    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable
