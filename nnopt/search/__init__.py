"""Spaces of candidates, samplers, and the searches over them."""
