"""Bases kept in few bits, to compose with other methods."""
