"""Parts of ``bench_fit.py``."""
