"""Running, training and routing tasks in a PyTorch model."""
