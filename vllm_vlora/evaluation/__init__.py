"""Everything that runs the base model: held-out losses, judging, gathering moments."""
