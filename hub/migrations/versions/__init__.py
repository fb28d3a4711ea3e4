"""One file a step; a step spells its tables out, because `schema.py` will have moved on when it runs."""
