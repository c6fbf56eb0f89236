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
    "s4d": [
        {"state_size": 10, "initialization": "lin", "discretization": "bilinear"},
        {"state_size": 2, "initialization": "inv", "bias": True, "smallest_step": 0.01, "largest_step": 0.5},
    ],
    "s4": [
        {"state_size": 2, "bias": True},
        {"state_size": 10, "smallest_step": 0.01, "largest_step": 0.5},
    ],
}
