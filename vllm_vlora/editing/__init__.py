"""Adding tasks to a checkpoint, removing them, rebuilding it."""
