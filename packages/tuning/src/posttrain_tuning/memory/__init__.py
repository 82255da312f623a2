"""What a configuration takes of memory, and what to change so that it fits."""
