"""Adapted modules of a live model: the layer, what spans several of them, and what can be read from them."""
