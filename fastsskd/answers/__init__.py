"""A teacher's answers, stored once and read in training."""
