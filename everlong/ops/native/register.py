"""Makes operators of torch from kernels: autograd, torch.compile, checkpointing and autocast then know them.

`torch.library.custom_op` would do the same, but its first call imports torch's compiler, and each call costs more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("everlong_native", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, compute: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """The operator `everlong_native::NAME` with this schema, `NAME(Tensor a, ...) -> ...`.

    Args:
        compute: what it does on the CPU.
        shapes: the same arguments -> empty results, for tracing.
    """
    LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    name = schema.partition("(")[0]
    LIBRARY.impl(name, compute, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"everlong_native::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.everlong_native, name).default  # type: ignore[no-any-return]


def differentiate(
    operator: Any,
    backward: Callable[..., Sequence[Tensor | None]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Gives an operator its gradient.

    Args:
        backward: (context, *gradients of the results, None where a result has none) -> gradients of the arguments.
        save: (context, arguments, results) keeps what `backward` needs.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    torch.library.register_autograd(operator.name(), backward, setup_context=setup, lib=LIBRARY)
