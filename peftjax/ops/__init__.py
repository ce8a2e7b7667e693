"""Maths shared by methods: pure functions on arrays."""
