"""The brain: membership, planning, routing, request lifecycle, text, HTTP, metrics."""
