"""Distributions of source models: which dialogues, which positions, whose distribution, and the loss that teaches it.

`dialogues` reads and checks data, `encoding` finds the learnt positions, `fuse` chooses or mixes distributions, `losses`
turns them into a training loss.
"""
