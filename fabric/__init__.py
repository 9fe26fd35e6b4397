"""Finding, trusting and talking to each other: what nodes and schedulers share."""
