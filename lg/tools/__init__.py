"""What a person runs besides training."""
