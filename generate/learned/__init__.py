"""One learned generator a file: `name(school, *, options)` fits it, and `restore` is its way back from a file."""
