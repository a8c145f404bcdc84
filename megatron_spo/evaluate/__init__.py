"""Answers of an exported model, on files alone: prompts in, responses out."""
