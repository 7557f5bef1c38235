"""The recipe that made the embedded model; nothing else needs it."""
