"""The short convolution over a tree of inputs, by the kernel of kernels/tree_convolution.cpp.

Where a gradient may be asked for, torch's operators compute instead.
"""

import torch
from torch import Tensor

from everlong.ops.convolution import causal_conv1d_tree_torch
from everlong.ops.dispatch import NATIVE_DTYPES
from everlong.ops.native.call import call
from everlong.ops.native.register import register
from everlong.ops.tree import ConvolutionRecords, Tree


def causal_conv1d_tree_native(
    x: Tensor, weight: Tensor, *, tree: Tree, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, ConvolutionRecords]:
    """Each node's input and its ancestors' through the taps; sums are float32."""
    tensors = [tensor for tensor in (x, weight, bias, state) if tensor is not None]
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if differentiated or not all(tensor.dtype in NATIVE_DTYPES for tensor in tensors):
        return causal_conv1d_tree_torch(x, weight, tree=tree, bias=bias, activation=activation, state=state)
    y = _convolution(x, weight, bias, state, tree.parents, activation == "silu")
    return y, ConvolutionRecords(tree.parents, x, state)


def _compute(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, parents: Tensor, activated: bool) -> Tensor:
    y = _shapes(x, weight, bias, state, parents, activated)
    call(
        "tree_convolution",
        _rows(x),
        weight,
        bias,
        _rows(state),
        parents.contiguous(),
        y,
        *x.shape,
        weight.shape[1],
        activated,
    )
    return y


def _shapes(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, parents: Tensor, activated: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rows(x: Tensor) -> Tensor:
    """With neighbouring channels side by side in memory, as the kernel reads them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


_convolution = register(
    "tree_convolution(Tensor x, Tensor weight, Tensor? bias, Tensor state, Tensor parents, bool activated) -> Tensor",
    _compute,
    _shapes,
)
