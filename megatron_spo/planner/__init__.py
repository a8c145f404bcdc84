"""Estimates memory, time and cost of a run and finds layouts that fit, without a GPU. Does not import torch."""
