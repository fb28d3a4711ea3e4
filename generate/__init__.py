"""A description and a library of adapters into a new adapter."""
