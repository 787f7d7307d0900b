"""Engines: what has to be written (plan), how one block of it is computed (blocks), and where the work runs (local)."""
