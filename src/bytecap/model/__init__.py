"""From a checkpoint on disk to tensors, token windows, statistics and scores."""
