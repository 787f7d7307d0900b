"""Verbs: one function each, and one command of the same name. They return values; commands print."""
