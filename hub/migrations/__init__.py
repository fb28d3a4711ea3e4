"""How the catalogue's tables came to be, step by step; alembic runs `versions/` in order through `env.py`.

To change a table: write the next `versions/v000N_*.py`, make `schema.py` say the same (a test compares the two) and
raise `schema.NEWEST`. A released migration is never edited.
"""
