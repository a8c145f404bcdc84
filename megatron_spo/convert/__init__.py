"""Conversion of models and checkpoints between Hugging Face, Megatron, NeMo 2 and PEFT formats."""
