"""Open and save checkpoints: every parameter goes straight to its place on the mesh.

Three kinds of directory: a model directory (made by `maverick convert`), a PyTorch checkpoint as it is (Hugging Face or
Meta's), and the embedded mini model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from maverick_jax.adapter import load_adapter
from maverick_jax.assets import mini_directory
from maverick_jax.config.checks import path_of, show
from maverick_jax.convert import MANIFEST, PARAMS, ModelDirectory, Source, open_model_directory, open_source
from maverick_jax.convert.build import orbax, remote
from maverick_jax.convert.build.building import building
from maverick_jax.convert.build.manifest import write_manifest
from maverick_jax.convert.build.orbax import flatten, unflatten
from maverick_jax.convert.formats.agreement import compare_names
from maverick_jax.convert.formats.companions import COMPANIONS, TEMPLATES, copy_companions, find_companions
from maverick_jax.convert.formats.recognize import find_directory, local_path
from maverick_jax.errors import UserError
from maverick_jax.model import Llama4, get_abstract_model, parameter_name
from maverick_jax.model.low_rank import adapters
from maverick_jax.model.parameter import float_dtype
from maverick_jax.model.quantized import lay_for_float8_rows, set_quantized, use_float8_rows
from maverick_jax.sharding import AXES, AttendOnMesh, Constrain, Dispatcher, Layout, check_mesh, get_layout, make_dispatcher
from maverick_jax.sharding.devices import check_room, local_devices

ACTIVATIONS = (None, "fp8")
SAMPLES, SAMPLE_BYTES = 32, 4096  # of weights, for `identity`


def load(
    path: str | Path | None = None,
    *,
    mesh: Mesh | None = None,
    layout: str | Layout | Mapping[str, Any] | None = None,
    dispatcher: str | Dispatcher | None = None,
    dtype: DTypeLike | None = None,
    activations: str | None = None,
    adapter: str | Path | None = None,
    training: bool = False,
) -> Llama4:
    """A model whose every parameter is on its devices. No host holds more than its own devices need, plus one slice.

    Args:
      path: model directory (also `gs://bucket/model`), PyTorch checkpoint as it is (Hugging Face or Meta's), or a Hub id
        ("org/name") if `huggingface_hub` is installed; None is the embedded mini model.
      mesh: from `make_mesh`; None is one device of this process.
      layout: name or table of the layout; None is `throughput`.
      dispatcher: "local", "all_to_all", "ragged" or one of your own; None: what mesh and layout call for.
      dtype: of weights and activations; None as stored.
      activations: "fp8" rounds what meets routed experts in fp8 to float8 too, with a scale per token: other results, and on Hopper
        products of float8.
      adapter: directory of a LoRA, PEFT's or ours; in the dtype of the activations to be used, in float32 to be learned further.
      training: for gradients: the layout is `training` unless another is named, and the dispatcher is one that they pass.

    Raises:
      UserError: no checkpoint there, an incomplete or inconsistent one, a mesh that does not divide the model, or devices without room
        for it; no adapter, or one for another base.
    """
    checkpoint = open_checkpoint(resolve(path))
    return read_model(
        checkpoint,
        mesh=mesh,
        layout=layout,
        dispatcher=dispatcher,
        dtype=dtype,
        activations=activations,
        adapter=adapter,
        training=training,
    )


def read_model(
    checkpoint: ModelDirectory | Source,
    *,
    mesh: Mesh | None = None,
    layout: str | Layout | Mapping[str, Any] | None = None,
    dispatcher: str | Dispatcher | None = None,
    dtype: DTypeLike | None = None,
    activations: str | None = None,
    adapter: str | Path | None = None,
    training: bool = False,
) -> Llama4:
    """`load` of what `open_checkpoint` has opened."""
    if activations not in ACTIVATIONS:
        raise UserError(f"activations is {show(activations)}: it must be fp8, or None for those of the dtype.")
    config, table = checkpoint.config, get_layout("training" if training and layout is None else layout)
    options: dict[str, Any] = {"dtype": float_dtype(config.dtype if dtype is None else dtype)}
    if mesh is None:
        table.check_axes(AXES)
    else:
        check_mesh(mesh)
        table.check(config, mesh)
        options |= {"constrain": Constrain(mesh, table), "attend": AttendOnMesh(mesh, table)}
    options["dispatcher"] = make_dispatcher(mesh, table, dispatcher, training=training)
    model = get_abstract_model(config, **options)
    set_quantized(model, checkpoint.parameters)
    if activations:
        use_float8_rows(model)
    graphdef, state = nnx.split(model)
    abstract = {parameter_name(name): _place(leaf, table, mesh) for name, leaf in nnx.to_flat_state(state)}
    check_room(list(abstract.values()), str(checkpoint.directory))
    arrays = _read_slices(checkpoint, abstract) if isinstance(checkpoint, Source) else _read_orbax(checkpoint, abstract)
    for name, leaf in nnx.to_flat_state(state):
        leaf.set_value(arrays[parameter_name(name)])
    model = nnx.merge(graphdef, state)
    lay_for_float8_rows(model)
    model.directory = str(checkpoint.directory)
    if adapter is not None:
        load_adapter(model, adapter, dtype="float32" if training else options["dtype"])
    return model


def open_checkpoint(directory: Path) -> ModelDirectory | Source:
    """A model directory, or a PyTorch checkpoint as it is."""
    return open_model_directory(directory) if (directory / PARAMS).exists() else open_source(directory)


def save(model: Llama4, path: str | Path, *, companions: str | Path | None = None) -> Path:
    """Write a model directory, which `load` and `maverick export` take.

    Args:
      path: must not exist; it is built in `PATH.partial/` and renamed once.
      companions: where tokenizer and template files come from; None: where the model was loaded from.

    Raises:
      UserError: no model, or one without weights; `path` exists, or there is no space left.
    """
    if not isinstance(model, Llama4):
        raise UserError(f"model is {show(model)}: it must be a Llama4, such as load gives.")
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        raise UserError("this model has no weights, get_abstract_model only describes them: there is nothing to save.")
    if adapters(model):
        raise UserError("this model has an adapter: `save_adapter` saves it, and its base is saved already.")
    path, given, companions = local_path(path), companions is not None, model.directory if companions is None else companions
    if companions is not None:
        companions = path_of("companions", companions)
        if given and not companions.is_dir():
            raise UserError(f"companions is {str(companions)!r}: there is no such directory.")
        find_companions(companions)  # refused now, and not when all weights are written
    arrays = {parameter_name(name): leaf[...] for name, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    with building(path, afresh=(f"{PARAMS}*", MANIFEST, *COMPANIONS)) as partial:
        if companions is not None:
            copy_companions(companions, partial)
        config = dataclasses.replace(model.config, dtype=model.text.embedding.dtype.name)
        (partial / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2) + "\n")
        orbax.save(partial / PARAMS, arrays)
        write_manifest(partial, {name: (array.shape, np.dtype(array.dtype)) for name, array in arrays.items()})
    return path


def resolve(path: str | Path | None, *, weights: bool = True) -> Path:
    """The directory that a user means: the mini model for None, a local path, a download from the Hub (without `weights` none are
    fetched), or what stands for one in an object store.

    Raises:
      UserError: nothing is there, or it is no path.
    """
    if path is None:
        return mini_directory()
    if "://" in str(path):
        return Path(remote.fetch(str(path).rstrip("/")).name)
    return find_directory(path, weights=weights)


def identity(directory: Path) -> dict[str, str]:
    """Digests that tell checkpoints apart, in the time of a few small reads, for any size.

    Returns:
      Part of the checkpoint -> digest. Of the weights it covers the names and sizes of up to `SAMPLES` files and a sample of
      their bytes; of a model directory the manifest, which holds digests of all.
    """
    parts = {
        "config.json": ("config.json", "params.json"),
        "the tokenizer": ("tokenizer*", "chat_template*", f"{TEMPLATES}/*", "generation_config.json"),
    }
    small = {name: sorted(f for pattern in patterns for f in directory.glob(pattern) if f.is_file()) for name, patterns in parts.items()}
    digests = {name: hashlib.sha256(b"".join(file.read_bytes() for file in files)) for name, files in small.items()}
    if (directory / MANIFEST).is_file():
        digests["the checkpoint"] = hashlib.sha256((directory / MANIFEST).read_bytes())
        return {name: digest.hexdigest()[:12] for name, digest in digests.items()}
    weights = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.pth"))
    digests["the checkpoint"] = hashlib.sha256(str(len(weights)).encode())
    for path in weights[:: len(weights) // SAMPLES + 1]:
        with path.open("rb") as file:
            file.seek(path.stat().st_size // 2)
            digests["the checkpoint"].update(f"{path.name} {path.stat().st_size}".encode() + file.read(SAMPLE_BYTES))
    return {name: digest.hexdigest()[:12] for name, digest in digests.items()}


def _place(leaf: nnx.Variable, layout: Layout, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    sharding: Sharding = SingleDeviceSharding(local_devices()[0])
    if mesh is not None:
        sharding = layout.sharding(leaf.get_metadata()["axes"], leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_orbax(checkpoint: ModelDirectory, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the Orbax checkpoint of a model directory."""
    from orbax.checkpoint import v1 as ocp

    directory = checkpoint.directory
    compare_names(directory, checkpoint.parameters, abstract)
    for name, leaf in abstract.items():
        if checkpoint.parameters[name][0] != leaf.shape:
            raise UserError(f"{directory}: {name} has shape {checkpoint.parameters[name][0]}, config.json asks for {leaf.shape}.")
    checkpoint.check_chunks()
    try:
        with orbax.quiet():
            return flatten(ocp.load(checkpoint.params, unflatten(abstract)))
    except Exception as error:  # Orbax raises the bare class for an array that it cannot read
        raise UserError(f"{checkpoint.params} cannot be read ({error}): convert the checkpoint again.") from error


def _read_slices(checkpoint: Source, abstract: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Read the files of a PyTorch checkpoint: each device its own slices."""

    def read(name: str, dtype: np.dtype) -> Callable[[Any], np.ndarray]:
        return lambda index: checkpoint.read(name, index).astype(dtype, copy=False)

    return {name: jax.make_array_from_callback(leaf.shape, leaf.sharding, read(name, leaf.dtype)) for name, leaf in abstract.items()}
