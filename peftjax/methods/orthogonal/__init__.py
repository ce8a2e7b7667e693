"""Methods that rotate the input space of a kernel."""
