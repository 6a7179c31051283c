"""Compiled generation: greedy, beam search, sampling."""
