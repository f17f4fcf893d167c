"""Checkpoints of other packages, vlora (vlora-dev) and lorashare: read, checked and converted."""
