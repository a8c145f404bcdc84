"""Generates and scores answers of exported models, reading and writing files only."""
