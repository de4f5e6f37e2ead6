"""Sequence mixers: what a layer does across time, each with a parallel form, a step form and a state between them."""
