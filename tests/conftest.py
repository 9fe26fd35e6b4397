"""What all tests share."""

from __future__ import annotations

from tests.cluster import share_what_nodes_find_out

share_what_nodes_find_out()
