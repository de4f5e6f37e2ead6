"""Decoding: sampling, generation, beam search and speculation over a model that is given as pure functions."""
