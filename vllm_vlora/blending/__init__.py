"""Blends of a checkpoint's tasks that are in no file: made when they are asked for."""
