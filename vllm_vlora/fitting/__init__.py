"""Shared bases, clusters of tasks, and the metric that they are fitted in."""
