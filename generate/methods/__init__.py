"""One generator a file: `def name(library, *, options)` learns from the library and returns a frozen generator."""
