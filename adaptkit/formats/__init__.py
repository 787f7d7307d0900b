"""Formats: ways to store an adapter. One file each; found by name through the entry points `adaptkit.formats`."""
