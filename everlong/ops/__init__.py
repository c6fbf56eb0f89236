"""The operators: pure functions on tensors, each in several forms and backends that agree."""

from everlong.ops.attention import softmax_attention
from everlong.ops.delta import delta_rule, dplr
from everlong.ops.dispatch import explain, use_backend
from everlong.ops.recurrence import linear_attention
from everlong.ops.scan import causal_conv1d, linear_scan, long_convolution, selective_scan, sliding_window_max
from everlong.ops.tree import KeyRecords, commit

__all__ = [
    "KeyRecords",
    "causal_conv1d",
    "commit",
    "delta_rule",
    "dplr",
    "explain",
    "linear_attention",
    "linear_scan",
    "long_convolution",
    "selective_scan",
    "sliding_window_max",
    "softmax_attention",
    "use_backend",
]
