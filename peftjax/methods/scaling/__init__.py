"""Methods that scale and shift features."""
