"""Training stages. So far: the embedded mini model."""
