"""Thin commands: parse flags, call research/, print. Heavy imports come after the flags are parsed."""
