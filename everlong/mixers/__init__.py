"""Sequence mixers: one file each, all under the contract of `base.py`."""

from everlong.mixers.base import Context, Cost, Mixer, Traits, load, names

__all__ = ["Context", "Cost", "Mixer", "Traits", "load", "names"]
