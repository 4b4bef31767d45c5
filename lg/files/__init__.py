"""Files that survive crashes: atomic writes, locks, safe pickles."""
