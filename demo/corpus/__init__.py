"""Generators of the text that the built-in model is trained and scored on."""
