"""Speed and memory, measured side by side with what exists. ``make bench``."""
