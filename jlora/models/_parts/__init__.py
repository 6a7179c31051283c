"""Blocks, attention and norms that several families are made of."""
