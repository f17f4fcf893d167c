"""Parts of bench_fidelity.py."""
