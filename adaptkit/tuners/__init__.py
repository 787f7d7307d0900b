"""Tuners: what a weight becomes. One file each; found by name through the entry points `adaptkit.tuners`."""
