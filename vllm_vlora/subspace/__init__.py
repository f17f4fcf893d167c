"""Adapters of one model as points of a shared subspace, in memory: fit, project, absorb, train, merge.

The names are those of the package vlora-dev; what they stand on is the rest of this library.
"""
