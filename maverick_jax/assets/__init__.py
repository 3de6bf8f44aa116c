"""The embedded mini model: a Hugging Face checkpoint with every part of Llama 4, trained on handwritten digits."""

from pathlib import Path


def mini_directory() -> Path:
    """Its Hugging Face directory."""
    return Path(__file__).parent / "mini"
