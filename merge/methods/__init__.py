"""One merging method a file: `def name(adapters, weights, *, options) -> Adapter`."""
