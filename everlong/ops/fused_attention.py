"""Softmax attention out of torch's fused kernels, on blocks for which no mask of T by S is needed.

    bfloat16 on a CPU that has it       products of blocks of our own (ops/product_attention.py), masked or not
    plain causal, or nothing masked     one call
    sliding window                      bands: blocks of queries, folded into the batch, with the keys they reach
    a window with a mask or a bias      tiles of our own (ops/online_softmax.py)
    everything else                     blocks of queries, each with a mask of its own, of MASK_LIMIT elements at most

Shapes    q [B, T, H, K];  k [B, S, Hkv, K];  v [B, S, Hkv, V];  o [B, T, H, V];  lse [B, T, H]
Cost      of a window w: O(T w) time and memory, 1.25 to 1.5 times the FLOPs that the pairs in the window need
Deviates  what the kernels do not offer, a gradient of the bias or of lse, is left to `tiled_attention`
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from everlong.ops.dispatch import multiplies_bfloat16
from everlong.ops.online_softmax import tiled_attention
from everlong.ops.product_attention import product_attention
from everlong.ops.scoring import Band, Result, Scoring, accumulator, blocks, joined, nothing, uncompiled

MASK_LIMIT = 1 << 22  # elements of the mask that one call gets


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, *, with_lse: bool) -> Result:
    """Attention by the fastest kernels that serve it. [o, lse]; lse is None where it was not asked for."""
    if scoring.learns(q.device) or (with_lse and not _kernel_gives_lse(q, k, v)):
        return tiled_attention(q, k, v, scoring)
    rows = slice(0, q.shape[1])
    columns = scoring.band.reach(rows, k.shape[1])
    k, v, scoring = k[:, columns], v[:, columns], scoring.cut(rows, columns)
    columns, band = slice(0, k.shape[1]), scoring.band
    bounded = band.left + band.right < q.shape[1]
    shared = scoring.mask is None or scoring.mask.shape[1] == 1
    if scoring.bias is None and shared and not with_lse and _by_products(q, band, k.shape[1]):
        rule = scoring.scale, band.offset, band.left, band.right
        return product_attention(q, k, v, *rule, scoring.mask), None
    if scoring.mask is None and scoring.bias is None and k.shape[1]:
        if band.covers(rows, columns):
            return _kernel(q, k, v, scoring, with_lse=with_lse)
        if band.offset == 0 == band.right and band.left >= q.shape[1] - 1:
            return _kernel(q, k, v, scoring, with_lse=with_lse, causal=True)
        if bounded:
            return uncompiled(_in_bands)(q, k, v, scoring, with_lse=with_lse)
    elif bounded:
        return tiled_attention(q, k, v, scoring)
    return uncompiled(_in_blocks)(q, k, v, scoring, with_lse=with_lse)


def _in_bands(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, *, with_lse: bool) -> Result:
    """A sliding window: queries whose whole window exists, in blocks under one mask; then those at the two ends."""
    B, T, H, _ = q.shape
    S, band = k.shape[1], scoring.band
    reach = band.left + band.right
    # The fewer queries in a block, the fewer keys beyond a query's own window; but torch's kernel likes 192 or more.
    block = max(_rounded(reach / 4), min(_rounded(reach / 2), 192), 32)
    start = min(max(band.left - band.offset, 0), T)
    count = max(0, min(T, S - band.right - band.offset) - start) // block
    if count == 0:
        return _in_blocks(q, k, v, scoring, with_lse=with_lse)
    stop, width = start + count * block, block + reach

    first = band.offset + start - band.left
    overlapping = (x[:, first : first + (count - 1) * block + width].unfold(1, width, block) for x in (k, v))
    keys, values = (x.permute(0, 1, 4, 2, 3).reshape(B * count, width, *x.shape[2:4]) for x in overlapping)
    queries = q[:, start:stop].reshape(B * count, block, H, -1)
    rule = replace(scoring, band=replace(band, offset=band.left))
    o, lse = _in_blocks(queries, keys, values, rule, with_lse=with_lse)
    body = o.reshape(B, count * block, H, -1), None if lse is None else lse.reshape(B, count * block, H)

    results = [body]
    if start > 0:
        results.insert(0, _rows(q, k, v, scoring, slice(0, start), with_lse=with_lse))
    if stop < T:
        results.append(_rows(q, k, v, scoring, slice(stop, T), with_lse=with_lse))
    return joined(results, 1)


def _rows(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, rows: slice, *, with_lse: bool) -> Result:
    return fused_attention(q[:, rows], k, v, scoring.cut(rows, slice(0, k.shape[1])), with_lse=with_lse)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, *, with_lse: bool) -> Result:
    """Blocks of queries, each against the keys that it reaches under a mask of its own."""
    T, S = q.shape[1], k.shape[1]
    results = []
    for rows in blocks(slice(0, T), max(128, MASK_LIMIT // max(1, S * _copies(q, scoring)))):
        columns = scoring.band.reach(rows, S)
        part = q[:, rows], k[:, columns], v[:, columns], scoring.cut(rows, columns)
        results.append(_kernel(*part, with_lse=with_lse) if columns.stop > columns.start else nothing(*part[:3]))
    return joined(results, 1)


def _rounded(size: float) -> int:
    return 32 * math.ceil(size / 32)


def _copies(q: Tensor, scoring: Scoring) -> int:
    """How many planes [T, S] the mask of all these queries and keys has."""
    of_bias = q.shape[2] if callable(scoring.bias) else 1
    shapes = [x.shape[:2].numel() for x in (scoring.mask, scoring.bias) if isinstance(x, Tensor)]
    return max(of_bias, *shapes, 1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring, *, with_lse: bool, causal: bool = False) -> Result:
    """One call of torch's kernel; `causal` is torch's own, from the first key on, and replaces the mask."""
    mask = None if causal else _mask(q, k, scoring)
    size = v.shape[-1]
    # The kernel wants keys and values of one width; otherwise torch would hold all scores.
    width = max(q.shape[-1], size)
    q, k, v = (pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) if x.stride(-1) == 1 else x.transpose(1, 2).contiguous() for x in (q, k, v))
    if not with_lse:
        shared = q.shape[1] != k.shape[1]
        o = scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scoring.scale, enable_gqa=shared)
        return o.transpose(1, 2)[..., :size], None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scoring.scale
    )
    if mask is not None:
        lse = lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
    return o.transpose(1, 2)[..., :size], lse.transpose(1, 2)


def _mask(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor | None:
    """What the kernel is to be told of these queries and keys: nothing, a boolean mask, or one to be added."""
    rows, columns = slice(0, q.shape[1]), slice(0, k.shape[1])
    allowed, bias = scoring.allowed(rows, columns, q.device), scoring.added(rows, columns, q.device)
    if bias is not None:
        # In bfloat16 the distances 500 and 501 would be one; kernels elsewhere than on the CPU know one dtype only.
        bias = bias.to(accumulator(q) if q.device.type == "cpu" else q.dtype)
        bias = bias if allowed is None else torch.where(allowed, bias, -torch.inf)
    mask = allowed if bias is None else bias
    if mask is None:
        return None
    mask = mask.expand(*(1, 1, *mask.shape[:-2])[-2:], rows.stop, columns.stop)
    # The kernel takes the last axis as contiguous.
    return mask if mask.stride(-1) == 1 else mask.contiguous()


def _by_products(q: Tensor, band: Band, num_keys: int) -> bool:
    """Whether products of blocks are faster: in bfloat16, for enough queries, each of which sees a key."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[1] < 64:
        return False
    if band.offset < 0 or band.offset + q.shape[1] > num_keys:
        return band.covers(slice(0, q.shape[1]), slice(0, num_keys)) and num_keys > 0 and multiplies_bfloat16("cpu")
    return multiplies_bfloat16("cpu")


def _kernel_gives_lse(*inputs: Tensor) -> bool:
    """Whether lse comes out of the kernel: on the CPU, as long as nobody asks for its gradient."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return inputs[0].device.type == "cpu" and not learns
