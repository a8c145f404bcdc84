"""Turns sampled answers into preference pairs: scores them, and chooses which answers form a pair."""
