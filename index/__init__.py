"""Adapters and words as vectors, and the search over them."""
