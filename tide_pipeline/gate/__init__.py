"""Is the challenger better? Three doors: offline paired acceptance, engine benchmark with equivalence, live canary."""
