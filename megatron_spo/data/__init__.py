"""Pairs to packed rows: sources, tokenisation, batch plans, rows, and the cache of reference log-probs."""
