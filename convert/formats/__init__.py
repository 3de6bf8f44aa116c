"""What is read: names, files and spellings of PyTorch checkpoints, each opened as one `Source` of our parameters."""
