"""`fastsskd pack`: any audio -> 16 kHz mono tar shards."""
