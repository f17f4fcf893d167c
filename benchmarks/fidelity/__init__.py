"""The benchmark of fidelity; ``program`` has its options and the run."""
