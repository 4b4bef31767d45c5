"""Files that survive crashes: atomic writes and locks."""
