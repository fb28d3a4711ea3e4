"""The ground: the adapter value and its algebra, the formats it is read from and written to, and the catalogue."""
