"""How one module of one task is stored, and becomes factors again: private, joint, flat."""
