"""BRAIn: `iterated` and `offline` are its two loops; `keys` and `update` are what they share."""
