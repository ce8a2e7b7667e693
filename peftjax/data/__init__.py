"""Data sets, and batches of them that can be resumed."""
