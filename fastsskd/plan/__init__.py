"""`fastsskd plan`: memory, time and loader of a run at N GPUs."""
