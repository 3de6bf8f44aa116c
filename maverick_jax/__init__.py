"""Llama 4 (Maverick, Scout) in JAX and Flax NNX.

```python
import maverick_jax as mj

mesh = mj.make_mesh(data=1, expert=8, tensor=1)
model = mj.load("MODEL_DIR", mesh=mesh)
print(mj.Chat(model)("What is in this picture?", images=["dog.jpg"]))
```
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maverick_jax.checkpoint import load, save
    from maverick_jax.config import Config, TextConfig, VisionConfig
    from maverick_jax.errors import UserError
    from maverick_jax.inference.cache import KVCache
    from maverick_jax.inference.chat import Chat
    from maverick_jax.inference.generate import generate
    from maverick_jax.model import Llama4, get_abstract_model
    from maverick_jax.prompt import tile_image
    from maverick_jax.sharding import make_mesh

__version__ = "0.1.0"

# Where each public name lives. Imported on first use: `maverick --help` need not wait for jax.
_HOME = {
    "Chat": "inference.chat",
    "Config": "config",
    "KVCache": "inference.cache",
    "Llama4": "model",
    "TextConfig": "config",
    "UserError": "errors",
    "VisionConfig": "config",
    "generate": "inference.generate",
    "get_abstract_model": "model",
    "load": "checkpoint",
    "make_mesh": "sharding",
    "save": "checkpoint",
    "tile_image": "prompt",
}

__all__ = [
    "Chat",
    "Config",
    "KVCache",
    "Llama4",
    "TextConfig",
    "UserError",
    "VisionConfig",
    "generate",
    "get_abstract_model",
    "load",
    "make_mesh",
    "save",
    "tile_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'maverick_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"maverick_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
