"""Reads and tokenises preference pairs and packs them into rows."""
