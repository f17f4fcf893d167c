"""The benchmark of the fit; ``program`` has its options and the run."""
