"""The catalogue of bad and odd inputs: tables of cases, each with the answer that AdaptKit owes."""

from __future__ import annotations

from . import a_files, b_index, c_config, d_pickle, e_adapter_config, f_adapter_weights, g_paths
from .case import CASES, Case, Room

__all__ = ["CASES", "Case", "Room"]
TABLES = (a_files, b_index, c_config, d_pickle, e_adapter_config, f_adapter_weights, g_paths)
