"""Findings of papers, made visible: each file trains small models and measures what its paper says."""
