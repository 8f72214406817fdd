"""`fastsskd profile`: which part holds training up, and what would help."""
