"""The log of a run: console, json_stats lines, TensorBoard curves."""
