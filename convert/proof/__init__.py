"""What is there, and is it right: inventory, digests and tensors checked again, hidden states beside transformers."""
