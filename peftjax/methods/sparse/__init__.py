"""Methods that change few entries of the base."""
