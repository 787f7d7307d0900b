"""What virtual tokens come from while they train: rows, and for P-tuning and projected prefixes a small network on them."""

from __future__ import annotations

from torch import Tensor, nn


class Rows(nn.Module):
    """P = f(E)     E: (rows, d).  f is a network that subclasses add, and its result is all that is saved."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def forward(self, indices: Tensor) -> Tensor:
        """indices: (batch, rows), of rows. Returns (batch, rows, width)."""
        return self.through(self.embedding(indices))

    def through(self, rows: Tensor) -> Tensor:
        """f. Rows that were trained before have none: they are its results."""
        for name in ("transform", "lstm_head", "mlp_head"):
            if hasattr(self, name):
                rows = getattr(self, name)(rows)
                rows = rows[0] if isinstance(rows, tuple) else rows
        return rows

    def rows(self) -> Tensor:
        """P: (rows, width)"""
        return self.through(self.embedding.weight.unsqueeze(0))[0]


def mlp(width: int, hidden: int) -> nn.Sequential:
    """The encoder of P-tuning."""
    return nn.Sequential(
        nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
    )
