"""What is made: model directories, and Hugging Face checkpoints again. A kill at any moment leaves nothing half-made."""
