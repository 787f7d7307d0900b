"""Rewriting rules tried faster still make the same graphs."""

from __future__ import annotations

import gc
import weakref

import onnx_ir
import pytest
from onnxscript import rewriter
from onnxscript.rewriter._matcher import SimplePatternMatcher

from adaptkit.export.rules import quick_rules

HALVES = """
<ir_version: 10, opset_import: ["" : 20]>
halves (float[N, 8] x) => (float[N, 4] y)
<int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] last = {1}>
{
    right = Slice(x, four, eight, last)
    left = Slice(x, zero, four, last)
    turned = Neg(right)
    y = Add(left, turned)
}
"""


def rewritten(text: str) -> list[str]:
    model = onnx_ir.from_onnx_text(text)
    return [node.op_type for node in rewriter.rewrite(model).graph]


def test_a_rule_with_two_ends_still_finds_its_place():
    """Two halves that are sliced become a Split, as without."""
    plain = rewritten(HALVES)
    with quick_rules():
        quick = rewritten(HALVES)
    assert quick == plain == ["Split", "Neg", "Add"]


def test_rules_forget_the_graph_they_were_tried_on():
    """They live as long as the program, and a graph holds its model's numbers."""
    model = onnx_ir.from_onnx_text(HALVES)
    with quick_rules():
        rewriter.rewrite(model)
    seen = weakref.ref(model.graph)
    del model
    gc.collect()
    assert seen() is None


def test_nodes_of_another_kind_are_not_tried(monkeypatch: pytest.MonkeyPatch):
    """The whole graph is listed for its slices only; afterwards onnxscript is what it was."""
    tried: list[str] = []
    before = SimplePatternMatcher.match

    def told(self, model, graph, node, **how):
        if not self.pattern.has_single_output_node:
            tried.append(node.op_type)
        return before(self, model, graph, node, **how)

    monkeypatch.setattr(SimplePatternMatcher, "match", told)
    with quick_rules():
        rewritten(HALVES)
    assert set(tried) == {"Slice"}
    assert SimplePatternMatcher.match is told
