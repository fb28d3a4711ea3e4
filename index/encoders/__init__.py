"""One vector space a file: words (`text`), whole deltas (`delta`), column spaces (`columns`)."""
