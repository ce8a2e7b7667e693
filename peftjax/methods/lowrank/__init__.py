"""Methods that add a low-rank delta to a kernel."""
