"""`fastsskd index`: any data set layout -> one table of clips."""
