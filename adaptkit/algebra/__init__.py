"""Tensors in, tensors out: what the papers say, without adapters, files or models."""
