"""Open and save adapters (LoRA) in PEFT's files, routed experts included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from maverick_jax.config.checks import path_of, show
from maverick_jax.convert.build.building import building, find_destination
from maverick_jax.convert.formats import peft, safetensors
from maverick_jax.convert.formats.adapter_base import BASE, check_base, fingerprint
from maverick_jax.convert.formats.recognize import find_directory
from maverick_jax.errors import UserError
from maverick_jax.model import Llama4
from maverick_jax.model.low_rank import Adaptable, adaptable, adapters, place, set_adapter
from maverick_jax.model.named_adapters import Joined, NamedAdapters
from maverick_jax.model.parameter import float_dtype, parameter_name


def load_adapter(model: Llama4, path: str | Path, *, dtype: DTypeLike | None = None) -> list[str]:
    """Give a model the adapter of a directory; it lies on the mesh beside the weights.

    Args:
      model: on its devices, without an adapter.
      path: what `save_adapter` or PEFT has written, or a Hub id.
      dtype: of the thin matrices; None as stored. Products take them in the activations' dtype.

    Returns:
      The names of the adapted weights.

    Raises:
      UserError: no LoRA there, one for another base, or a model that has an adapter already.
    """
    if adapters(model):
        raise UserError("this model has an adapter already: load the base anew for another one.")
    weights = {weight.name: weight for weight in adaptable(model)}
    known = _read(find_directory(path), model, norms_of(model), weights)
    for name, (a, b, scale) in known.items():
        kind = a.dtype if dtype is None else float_dtype(dtype)
        places = [place(model, weights[name], thin) for thin in weights[name].thin(a.shape[-1])]
        laid_a, laid_b = (_laid(values.astype(kind, copy=False), where) for values, where in zip((a, b), places, strict=True))
        set_adapter(model, weights[name], laid_a, laid_b, scale)
    return [*known]


def load_adapters(model: Llama4, paths: Mapping[str, str | Path]) -> NamedAdapters:
    """Adapters of which each request chooses one by its name; they lie on the mesh beside the weights, in the activations' dtype.

    Args:
      model: on its devices, without an adapter.
      paths: by name, as of `load_adapter`.

    Raises:
      UserError: a name that is none; as `load_adapter`; or one that adapts the vision tower, which computes a picture once for all.
    """
    if not isinstance(paths, Mapping) or not all(isinstance(name, str) and name.strip() for name in paths):
        raise UserError(f"adapters is {show(paths)}: give directories by their names, such as {{'support': DIR}}.")
    if not paths:
        return NamedAdapters()
    if adapters(model):
        raise UserError("this model has an adapter, which all requests have: load the base alone to give adapters names.")
    weights, norms, dtype = {weight.name: weight for weight in adaptable(model)}, norms_of(model), np.dtype(model.text.embedding.dtype)
    found, digests = [], {}
    for name, path in paths.items():
        directory = find_directory(path)
        known = _read(directory, model, norms, weights)
        if seen := [adapted for adapted in known if weights[adapted].component == "vision"]:
            raise UserError(f"{directory} adapts {seen[0]}, and pictures are computed once for all requests: load it without a name.")
        folded = {adapted: _folded(matrices, dtype) for adapted, matrices in known.items()}
        if broken := [adapted for adapted, halves in folded.items() if not all(np.isfinite(half).all() for half in halves)]:
            raise UserError(f"{directory} has NaN or infinity in {broken[0]}, also for those who ask for another adapter: train it anew.")
        found.append(folded)
        digests[name] = identity(directory)["the adapter"]
    joined = {}
    for weight in weights.values():
        own = [folded.get(weight.name) for folded in found]
        if there := [halves for halves in own if halves is not None]:
            a = np.concatenate([half for half, _ in there], axis=-1)
            b = np.concatenate([half for _, half in there], axis=weight.sides.stack)
            places = [place(model, weight, thin) for thin in weight.thin(a.shape[-1])]
            ranks = tuple(0 if halves is None else halves[0].shape[-1] for halves in own)
            joined[weight.name] = Joined(_laid(a, places[0]), _laid(b, places[1]), ranks)
    return NamedAdapters(digests, joined)


def _folded(matrices: peft.Matrices, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """`a` and `b`, with the scale in it."""
    with np.errstate(over="ignore"):
        return matrices.a.astype(dtype), (np.float32(matrices.scale) * matrices.b.astype(np.float32)).astype(dtype)


def _read(directory: Path, model: Llama4, norms: str, weights: Mapping[str, Adaptable]) -> peft.Adapter:
    """An adapter's matrices, for these weights of a model with these norms."""
    known = peft.read_peft(directory, model.config)
    check_base(directory, norms)
    if looked_up := [name for name in known if name not in weights]:
        raise UserError(f"{directory} adapts {looked_up[0]}, which is looked up and not multiplied by: train it without.")
    return known


def save_adapter(model: Llama4, path: str | Path, *, layout: str = "peft") -> Path:
    """Write a model's adapter as PEFT does, in the dtype that it is learned in.

    Args:
      path: must not exist; it is built in `PATH.partial/` and renamed once.
      layout: of routed experts: "peft", which PEFT reads with transformers' Llama 4, or "vllm".

    Raises:
      UserError: a model without adapters, another layout; `path` exists, or there is no space left.
    """
    if layout not in peft.LAYOUTS:
        raise UserError(f"layout is {show(layout)}: choose one of {', '.join(peft.LAYOUTS)}.")
    learned = {name: peft.Matrices(_whole(weight.a[...]), _whole(weight.b[...]), weight.scale) for name, weight in adapters(model).items()}
    if not learned:
        raise UserError("this model has no adapter: there is nothing to save.")
    out = find_destination(path_of("path", path))
    tensors, fields = peft.spell(learned, model.config, layout)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": model.directory,
        "bias": "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        **fields,
    }
    with building(out, afresh=(peft.CONFIG, peft.WEIGHTS, BASE)) as partial:
        (partial / peft.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (partial / BASE).write_text(json.dumps({"norms": norms_of(model)}, indent=2) + "\n")
        with open(partial / peft.WEIGHTS, "wb") as stream:
            stream.write(safetensors.make_header({name: (array.shape, array.dtype) for name, array in tensors.items()}))
            for array in tensors.values():
                stream.write(array.reshape(-1).view(np.uint8).data)
    return out


def identity(path: str | Path) -> dict[str, str]:
    """A digest that tells adapters apart."""
    directory, digest = find_directory(path), hashlib.sha256()
    for file in (directory / peft.CONFIG, directory / peft.WEIGHTS):
        digest.update(file.read_bytes() if file.is_file() else b"")
    return {"the adapter": digest.hexdigest()[:12]}


def norms_of(model: Llama4) -> str:
    """The digest by which an adapter knows its base."""
    leaves = {parameter_name(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    return fingerprint(model.config, lambda name: _whole(leaves[name][...]))


def _laid(values: np.ndarray, where: Sharding) -> jax.Array:
    """Of values that every process has whole, each device its part."""
    return jax.make_array_from_callback(values.shape, where, lambda index: values[index])


def _whole(array: jax.Array) -> np.ndarray:
    """On the host, of all processes' devices."""
    if not array.is_fully_addressable and isinstance(array.sharding, NamedSharding):
        array = jax.jit(jnp.copy, out_shardings=NamedSharding(array.sharding.mesh, PartitionSpec()))(array)
    return np.asarray(array)
