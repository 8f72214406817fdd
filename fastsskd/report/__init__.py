"""What a run shows: its table, its page, its curves beside another's."""
