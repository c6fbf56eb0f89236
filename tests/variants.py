"""Options beyond the defaults under which the laws of tests/mixers/test_laws.py must hold, by mixer.

An entry may say that it is not causal; the laws that speak of an order of tokens then leave it out.
"""

VARIANTS = {
    "attention": [
        {"num_heads": 6, "num_kv_heads": 2, "qk_norm": True, "bias": True},
        {"num_heads": 2, "window": 5},
        {"num_heads": 3, "position": "alibi"},
        {"num_heads": 3, "position": "none", "window": 1},
        {"num_heads": 3, "causal": False},
        {"num_heads": 3, "causal": False, "window": 4},
    ],
    "linear_attention": [
        {"num_heads": 2, "position": "rope"},
        {"num_heads": 3, "feature_map": "identity"},
        {"num_heads": 3, "causal": False},
    ],
    "gated_deltanet": [
        {"num_heads": 4, "num_key_heads": 2, "key_size": 5, "value_expansion": 2.0, "eigenvalues": "both"},
        {"num_heads": 3, "kernel": 1},
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
}
