"""onnxscript's rewriting rules, tried faster, and made to forget: the graphs they make are the same, to the bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quick_rules() -> Iterator[None]:
    """Inside, a rule with several last operations is tried only on nodes that are the first of them.

    SimplePatternMatcher lists all nodes of the graph whenever such a rule is tried, which is on every node: a third of the
    time of exporting 28 layers, for a rule about pairs of Slice. Its rules live as long as the program and remember the last
    node they saw, and through it the whole graph with the model's numbers; afterwards they do not. Without onnxscript as it
    is known, nothing changes.
    """
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher
    except ImportError:
        yield
        return
    original = SimplePatternMatcher.match
    used: set[Any] = set()

    def match(self: Any, model: Any, graph: Any, node: Any, **how: Any) -> Any:
        used.add(self)
        pattern = self.pattern
        if not pattern.has_single_output_node:
            first = pattern.output_nodes[0].op_identifier()
            if first is not None and first != node.op_identifier():
                return MatchResult().fail("another operation")
        return original(self, model, graph, node, **how)

    SimplePatternMatcher.match = match
    try:
        yield
    finally:
        SimplePatternMatcher.match = original
        for matcher in used:
            matcher._match, matcher._current_node, matcher._graph = MatchResult(), None, None
