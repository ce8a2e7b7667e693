"""Methods that put trained vectors before a text, or before keys and values."""
