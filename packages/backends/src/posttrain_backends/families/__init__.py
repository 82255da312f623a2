"""The model families that more than one framework computes: sizes, files and names. Imports no framework."""
