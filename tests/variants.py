"""Options beyond the defaults under which the laws of tests/mixers/test_laws.py must hold, by mixer.

An entry may say that it is not causal; the laws that speak of an order of tokens then leave it out.
"""

from everlong import mixers

CHOSEN = None  # by the option --mixer, a mixer of somebody else's


def names():
    """The mixers that the laws are checked for."""
    return mixers.names() if CHOSEN is None else [CHOSEN]


VARIANTS = {
    "attention": [
        {"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "bias": True},
        {"num_heads": 2, "window": 5},
        {"num_heads": 3, "position": "alibi"},
        {"num_heads": 3, "position": "none", "window": 1},
        {"num_heads": 3, "causal": False},
        {"num_heads": 3, "causal": False, "window": 4},
        {"num_heads": 2, "position": {"position": "rope", "layout": "interleaved", "fraction": 0.45}},
        {"num_heads": 3, "position": {"position": "rope", "scaling": "yarn", "factor": 4.0, "original_length": 64}},
        {
            "num_heads": 6,
            "num_kv_heads": 2,
            "position": {"position": "rope", "scaling": "dynamic", "factor": 2.0, "original_length": 20, "step": 8},
        },
        {"num_heads": 3, "position": {"position": "t5", "buckets": 8, "max_distance": 20}},
        {"num_heads": 3, "position": "t5", "causal": False},
        {"num_heads": 6, "num_kv_heads": 2, "position": {"position": "shaw", "max_distance": 5}},
        {"num_heads": 3, "position": {"position": "shaw", "max_distance": 4}, "causal": False, "window": 9},
        {"num_heads": 3, "position": "transformer_xl", "qk_norm": True},
        {"num_heads": 2, "num_kv_heads": 1, "position": "transformer_xl", "window": 7},
        {"num_heads": 3, "position": {"position": "deberta", "max_distance": 6}, "causal": False},
        {
            "num_heads": 6,
            "num_kv_heads": 2,
            "position": {
                "position": "deberta",
                "max_distance": 40,
                "buckets": 8,
                "p2c_index": "paper",
                "share_projections": True,
            },
        },
    ],
    "linear_attention": [
        {"num_heads": 2, "position": "rope"},
        {"num_heads": 2, "position": {"position": "rope", "layout": "interleaved", "scaling": "ntk", "factor": 2.0}},
        {"num_heads": 3, "feature_map": "identity"},
        {"num_heads": 3, "feature_map": "squared_relu", "feature_size": 5},
        {"num_heads": 2, "feature_map": "relu"},
        {"num_heads": 2, "feature_map": "exp"},
        {"num_heads": 3, "feature_map": "taylor", "feature_size": 4, "position": "rope"},
        {"num_heads": 6, "feature_map": "quadratic", "bias": True},
        {"num_heads": 2, "feature_map": "cosine"},
        {"num_heads": 4, "feature_map": "cosformer", "max_length": 40_000},
        {"num_heads": 3, "causal": False},
        {"num_heads": 3, "causal": False, "feature_map": "softmax"},
        {"num_heads": 3, "causal": False, "feature_map": "exp"},
        {"num_heads": 2, "causal": False, "feature_map": "cosformer", "max_length": 40_000},
    ],
    "performer": [
        {"num_heads": 3, "features": "hyperbolic", "num_features": 7, "position": "rope", "bias": True},
        {"num_heads": 2, "features": "relu", "draw": "regularized"},
        {"num_heads": 6, "num_features": 20, "draw": "independent"},
        {"num_heads": 2, "num_features": 11, "causal": False},
        {"num_heads": 2, "features": "relu", "num_features": 11, "causal": False},
    ],
    "gated_deltanet": [
        {"num_heads": 4, "num_key_heads": 2, "key_size": 5, "value_expansion": 2.0, "eigenvalues": "both"},
        {"num_heads": 3, "kernel": 1},
        {"num_heads": 3, "decay": "channel"},
        {"num_heads": 4, "num_key_heads": 2, "key_size": 5, "decay": "channel", "value_expansion": 0.5},
    ],
    "mamba2": [
        {"num_heads": 4, "num_groups": 2, "state_size": 7},
        {"num_heads": 3, "kernel": 2},
    ],
    "mamba": [
        {"expansion": 1.5, "state_size": 5, "kernel": 1, "step_rank": 1},
        {"expansion": 0.5, "state_size": 1, "kernel": 2, "step_rank": 40, "bias": True},
    ],
    "lru": [
        {"state_size": 7, "min_radius": 0.9, "max_radius": 0.999, "max_phase": 0.3},
        {"state_size": 80},
    ],
    "rg_lru": [
        {"hidden": 30, "num_heads": 5, "kernel": 1},
        {"num_heads": 1, "kernel": 3, "bias": True},
    ],
    "rnn": [
        {"hidden": 7},
        {"initialization": "uniform", "output": "none"},
        {"hidden": 50, "activation": "relu"},
    ],
    "lstm": [
        {"hidden": 7},
        {"initialization": "uniform", "output": "none", "forget_bias": 0.0},
    ],
    "gru": [
        {"hidden": 7},
        {"initialization": "uniform", "output": "none"},
    ],
    "s4d": [
        {"state_size": 10, "initialization": "lin", "discretization": "bilinear"},
        {"state_size": 2, "initialization": "inv", "bias": True, "smallest_step": 0.01, "largest_step": 0.5},
    ],
    "s4": [
        {"state_size": 2, "bias": True},
        {"state_size": 10, "smallest_step": 0.01, "largest_step": 0.5},
    ],
    "transnormer": [
        {"num_heads": 2, "position": "rope", "bias": True},
        {"num_heads": 3, "kind": "norm", "causal": False},
        {"num_heads": 2, "kind": "diag", "block_size": 8, "position": "rope"},
        {"num_heads": 3, "kind": "diag", "variant": "T1", "block_size": 5, "bias": True},
        {"num_heads": 3, "kind": "diag"},
        {"num_heads": 3, "kind": "diag", "block_size": 9, "causal": False},
        {"num_heads": 3, "kind": "diag", "variant": "T1", "causal": False},
    ],
    "retnet": [
        {"num_heads": 3, "value_expansion": 1.5},
        {"num_heads": 9, "value_expansion": 0.75},
    ],
    "gla": [
        {"num_heads": 3, "key_expansion": 1.0, "value_expansion": 0.5, "gate_rank": 2, "gate_temperature": 1.0},
        {"num_heads": 2, "kernel": 3, "key_expansion": 0.3},
        {"num_heads": 4, "kernel": 1},
    ],
    "deltanet": [
        {"num_heads": 3, "key_expansion": 0.5, "value_expansion": 1.5, "eigenvalues": "both"},
        {"num_heads": 2, "kernel": 1},
    ],
    "lightning": [
        {"num_heads": 3, "decay": "alibi", "rotation": "none", "values": "silu", "gate": "sigmoid", "gain": True},
        {"num_heads": 2, "gate_rank": 5},
        {"num_heads": 12, "rotation": "all", "decay": "alibi", "gate_rank": 3, "gate": "sigmoid"},
    ],
    "rwkv4": [
        {"feed_forward": 5},
        {"first": False},
    ],
    "rwkv6": [
        {"num_heads": 3, "mix_rank": 2, "decay_rank": 3},
        {"num_heads": 18, "first": False, "feed_forward": 7},
        {"num_heads": 2, "variant": "eagle"},
        {"num_heads": 4, "variant": "eagle", "first": False, "group_norm_eps": 1e-5},
    ],
    "rwkv7": [
        {"num_heads": 3, "decay_rank": 2, "rate_rank": 3, "value_rank": 5, "gate_rank": 4},
        {"num_heads": 18, "feed_forward": 7},
    ],
    "gau": [
        {"weights": "relu2_n2", "key_size": 6, "relative_bias": "rotary_bias", "norm": "layer", "divisor": 50},
        {"key_size": 8, "relative_bias": "t5", "causal": False},
        {"weights": "softmax", "key_size": 8, "relative_bias": "t5"},
        {"weights": "relu2_n2_bias", "key_size": 5, "expansion": 1.3, "position": "t5", "bias": True},
        {"key_size": 8, "relative_bias": {"position": "t5", "buckets": 8, "max_distance": 20}},
        {"weights": "laplace", "key_size": 8, "relative_bias": "alibi"},
        {"weights": "softmax_plus", "key_size": 10, "norm": "none"},
        {"weights": "laplace", "key_size": 7, "position": "none", "divisor": 64, "causal": False},
        {"weights": "softmax_plus", "key_size": 6, "causal": False},
    ],
    "flash": [
        {"chunk": 8, "weights": "relu2_n2", "key_size": 6, "relative_bias": "rotary_bias", "norm": "layer"},
        {"chunk": 10, "weights": "softmax_plus", "key_size": 8, "norm": "none"},
        {"chunk": 8, "key_size": 8, "relative_bias": "t5", "causal": False},
        {"chunk": 9, "key_size": 5, "expansion": 1.3, "position": "t5", "bias": True, "linear_divisor": "chunk"},
        {"chunk": 1, "weights": "relu2_n2_bias", "key_size": 4},
        {"chunk": 7, "weights": "softmax", "key_size": 8, "relative_bias": "alibi"},
        {"chunk": 64, "weights": "laplace", "key_size": 7, "position": "none"},
        {"chunk": 9, "weights": "softmax_plus", "key_size": 6, "causal": False},
    ],
    "linformer": [
        {"num_heads": 3, "length": 300, "slots": 7, "sharing": "none", "bias": True},
        {"num_heads": 2, "length": 300, "slots": 43, "projection": "convolution"},
        {"num_heads": 3, "length": 310, "slots": 5, "sharing": "layerwise"},
        {"num_heads": 2, "length": 301, "slots": 20, "sharing": "key_value"},
        {"num_heads": 2, "length": 300, "slots": 40, "projection": "mean"},
        {"num_heads": 3, "length": 300, "slots": 50, "projection": "max"},
        {"num_heads": 2, "length": 300, "slots": 60, "projection": "convolution", "sharing": "none"},
    ],
    "sparse_attention": [
        {"num_heads": 3, "pattern": "window", "window": 5, "global_tokens": 2, "position": "alibi"},
        {"num_heads": 6, "num_kv_heads": 3, "pattern": "strided", "stride": 5, "compose": "heads"},
        {"num_heads": 3, "pattern": "sparse", "stride": 6, "global_tokens": 4, "position": "t5"},
        {"num_heads": 2, "pattern": "atrous", "stride": 3},
        {"num_heads": 2, "stride": 9, "summary": 2, "global_tokens": 10, "global_projections": "own"},
        {"num_heads": 2, "stride": 4, "summary": 3, "compose": "far", "position": "none"},
        {"num_heads": 3, "pattern": "sparse", "stride": 5, "global_tokens": 3, "causal": False, "position": "alibi"},
        {"num_heads": 2, "stride": 8, "summary": 3, "compose": "heads", "causal": False},
        {
            "num_heads": 6,
            "num_kv_heads": 2,
            "pattern": "window",
            "window": 6,
            "global_tokens": 3,
            "global_projections": "own",
            "bias": True,
            "causal": False,
        },
    ],
}
