"""Methods that train a choice of the base's own leaves."""
