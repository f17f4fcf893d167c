"""Merging, blending and comparing tasks."""
