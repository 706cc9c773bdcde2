"""How fast a FLUX engine can be at best: work by part, and what a GPU could do of it."""
