"""What a run writes for people: log lines, JSON statistics and TensorBoard curves."""
