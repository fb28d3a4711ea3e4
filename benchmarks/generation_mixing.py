"""Rows of the generation benchmark in which a hypernetwork practises mixtures of tasks.

Where a library's tasks have no factors in common, as styles have none, a description that is like none of the known
ones makes a plain hypernetwork's adapter a wrong one. The share was chosen on four styles that no split holds out: of
0, 0.7 and 0.8 the largest did best there (the share is of tasks; 0.7 had mixtures of two).
"""

from __future__ import annotations

from generation_rows import Row, asked_hyper

SHARE = 0.8

MIXED, MIXED_WRONG = "hypernetwork, mixed tasks", "hypernetwork, mixed tasks, wrong description"
MIXED_ROWS = (
    Row(MIXED, asked_hyper(mixed=SHARE), version=4),
    Row(MIXED_WRONG, asked_hyper(mixed=SHARE, wrong=True), version=4),
)
