"""Collections whose adapters gain little: tiny models and their adapters, made again by ``train``."""
