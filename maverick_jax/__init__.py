"""Llama 4 (Maverick, Scout) in JAX and Flax NNX.

```python
import maverick_jax as mj

mesh = mj.make_mesh(data=1, expert=8, tensor=1)
model = mj.load("MODEL_DIR", mesh=mesh)
print(mj.Chat(model)("What is in this picture?", images=["dog.jpg"]))
```
"""

import difflib
import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. Imported on first use: `maverick --help` need not wait for jax.
_HOME = {
    "Chat": "inference.chat.Chat",
    "Config": "config.Config",
    "Engine": "inference.engine.Engine",
    "Grammar": "inference.grammar.Grammar",
    "KVCache": "inference.cache.KVCache",
    "Llama4": "model.Llama4",
    "Request": "inference.request.Request",
    "Sampling": "inference.sampling.Sampling",
    "TextConfig": "config.TextConfig",
    "Tokenizer": "prompt.Tokenizer",
    "UserError": "errors.UserError",
    "VisionConfig": "config.VisionConfig",
    "add_adapters": "model.low_rank.add_adapters",
    "convert_checkpoint": "convert.convert",
    "export_checkpoint": "convert.export",
    "generate": "inference.generate.generate",
    "get_abstract_model": "model.get_abstract_model",
    "load": "checkpoint.load",
    "load_adapter": "adapter.load_adapter",
    "make_mesh": "sharding.make_mesh",
    "save": "checkpoint.save",
    "save_adapter": "adapter.save_adapter",
    "tile_image": "prompt.tile_image",
    "verify_checkpoint": "convert.proof.verify.verify",
}
_PACKAGES = ("convert", "sharding")

__all__ = [
    "Chat",
    "Config",
    "Engine",
    "Grammar",
    "KVCache",
    "Llama4",
    "Request",
    "Sampling",
    "TextConfig",
    "Tokenizer",
    "UserError",
    "VisionConfig",
    "add_adapters",
    "convert_checkpoint",
    "export_checkpoint",
    "generate",
    "get_abstract_model",
    "load",
    "load_adapter",
    "make_mesh",
    "save",
    "save_adapter",
    "tile_image",
    "verify_checkpoint",
]

if TYPE_CHECKING:  # for editors; `__getattr__` would tell them that every name is there
    from maverick_jax import convert as convert
    from maverick_jax import sharding as sharding
    from maverick_jax.adapter import load_adapter, save_adapter
    from maverick_jax.checkpoint import load, save
    from maverick_jax.config import Config, TextConfig, VisionConfig
    from maverick_jax.convert import convert as convert_checkpoint
    from maverick_jax.convert import export as export_checkpoint
    from maverick_jax.convert.proof.verify import verify as verify_checkpoint
    from maverick_jax.errors import UserError
    from maverick_jax.inference.cache import KVCache
    from maverick_jax.inference.chat import Chat
    from maverick_jax.inference.engine import Engine
    from maverick_jax.inference.generate import generate
    from maverick_jax.inference.grammar import Grammar
    from maverick_jax.inference.request import Request
    from maverick_jax.inference.sampling import Sampling
    from maverick_jax.model import Llama4, get_abstract_model
    from maverick_jax.model.low_rank import add_adapters
    from maverick_jax.prompt import Tokenizer, tile_image
    from maverick_jax.sharding import make_mesh
else:

    def __getattr__(name):
        if name in _PACKAGES:
            return importlib.import_module(f"maverick_jax.{name}")
        if name in _HOME:
            module, _, attribute = _HOME[name].rpartition(".")
            return getattr(importlib.import_module(f"maverick_jax.{module}"), attribute)
        close = difflib.get_close_matches(name, __all__, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(__all__)}; load(path) opens a model."
        raise AttributeError(f"module 'maverick_jax' has no attribute {name!r}: {hint}", name=name)


def __dir__() -> list[str]:
    return [*__all__, *_PACKAGES, "__version__"]
