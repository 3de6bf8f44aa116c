"""The embedded mini model: a Hugging Face checkpoint with every part of Llama 4, trained on handwritten digits."""

from pathlib import Path


def mini_directory() -> Path:
    """Its Hugging Face directory."""
    return Path(__file__).parent / "mini"


def demo_adapter() -> Path:
    """The adapter with which `maverick train demo` begins: numbers and bars, half learned."""
    return Path(__file__).parent / "demo"
