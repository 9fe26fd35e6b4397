"""Every contact with mlx-lm that its public interface does not promise.

mlx-lm is pinned; what is used here is what to look at when the pin moves.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from parallax.fabric.errors import ModelBroken, UnknownArchitecture


class _LatePackage(ModuleType):
    """A package whose own code runs when something of it is asked for, not its modules alone."""

    def __getattr__(self, name: str) -> Any:
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec = self.__spec__
        if spec is None or spec.loader is None:
            raise AttributeError(name)
        spec.loader.exec_module(self)
        return getattr(self, name)


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function that imports its module when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


# What mlx_lm.utils imports and a node never uses: transformers and a client for the model hub
# come with it, and take most of a second. Whoever asks for these modules later gets them.
_STAND_INS: dict[str, dict[str, Any]] = {
    "mlx_lm.tokenizer_utils": {
        "TokenizerWrapper": object,  # named in annotations
        "load": _later("mlx_lm.tokenizer_utils", "load"),
    },
    "huggingface_hub": {"snapshot_download": _later("huggingface_hub", "snapshot_download")},
}


def _import_utils() -> None:
    """Imports mlx_lm.utils, which lowers the limits on open files as it is imported.

    The hard one too, which only a superuser could raise again: so its call goes nowhere.
    """
    spec = importlib.util.find_spec("mlx_lm")
    stand_ins: dict[str, ModuleType] = {}
    if "mlx_lm" not in sys.modules and spec is not None:
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _LatePackage
        sys.modules["mlx_lm"] = package
        for name, attributes in _STAND_INS.items():
            if name not in sys.modules:
                stand_ins[name] = sys.modules[name] = ModuleType(name)
                vars(stand_ins[name]).update(attributes)
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        importlib.import_module("mlx_lm.utils")
    finally:
        resource.setrlimit = set_limit
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


_import_utils()

import mlx_lm.utils  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

VERSION = importlib.metadata.version("mlx-lm")
MLX_VERSION = importlib.metadata.version("mlx")

Config = dict[str, Any]
Model = Any  # mlx.nn.Module: mlx.nn has no types
Cache = Any  # one slot: mlx-lm's KVCache, RotatingKVCache, ArraysCache, CacheList, Batch…
Caches = list[Cache]
Weights = dict[str, mx.array]

# What mlx-lm raises at configurations and weights that do not fit its model.
DEFECTS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
)


def model_classes(config: Config) -> tuple[type[Any], type[Any]]:
    """mlx-lm's ``Model`` and ``ModelArgs`` for a configuration.

    Raises:
        UnknownArchitecture: mlx-lm has none.
    """
    kind = config.get("model_type")
    try:
        classes: tuple[type[Any], type[Any]] = mlx_lm.utils._get_classes(config)
    except (*DEFECTS, ImportError) as error:
        raise UnknownArchitecture(
            f"Models of type {kind} are not supported",
            f"mlx-lm {VERSION} has no such architecture",
            "Use a model whose config.json names an architecture of mlx-lm",
            model_type=kind,
        ) from error
    return classes


def read_config(folder: Path) -> Config:
    """The configuration as mlx-lm reads it (``generation_config.json`` included).

    Raises:
        ModelBroken: it is missing, not JSON, or names no model type.
    """
    path = folder / "config.json"
    try:
        config: Config = mlx_lm.utils.load_config(folder)
    except FileNotFoundError as error:
        raise ModelBroken(
            f"{folder.name} has no config.json", "", "Fetch the model again", path=path
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ModelBroken(
            f"config.json of {folder.name} cannot be read", str(error), path=path
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelBroken(f"config.json of {folder.name} names no model_type", path=path)
    return config


def vocabulary(model: Model) -> int:
    """How many token ids can be looked up: the rows of the largest table of embeddings."""
    modules = [module for _, module in model.named_modules()]
    tables = [m.weight for m in modules if type(m).__name__.endswith("Embedding") and "weight" in m]
    return max((int(table.shape[0]) for table in tables), default=1 << 32)


def with_sizes(config: Config) -> Config:
    """The configuration with the sizes that it leaves to mlx-lm's defaults written out."""
    try:
        _, arguments = model_classes(config)
    except UnknownArchitecture:
        return config  # a part of another model's configuration, without an architecture of its own
    fields = dataclasses.fields(arguments) if dataclasses.is_dataclass(arguments) else ()
    sizes = {f.name: f.default for f in fields if type(f.default) is int and f.default > 0}
    full = sizes | config
    if isinstance(text := full.get("text_config"), dict):
        full["text_config"] = with_sizes(text)
    return full


def random_model(config: Config) -> Model:
    """A model of this configuration with mlx-lm's own initial weights, unevaluated."""
    model_class, arguments_class = model_classes(config)
    model: Model = model_class(arguments_class.from_dict(config))
    model.eval()
    return model


def build_model(folder: Path, weights: Weights) -> Model:
    """The folder's model made of ``weights`` (named as in its files) in place of its files.

    mlx-lm's loader runs as it is (``sanitize``, quantisation of every kind, strict check of names
    and shapes), on a folder that has the model's configuration but no weights. They come in through
    the one hook that the loader offers, the choice of the model's class: a subclass whose
    ``sanitize`` starts from ``weights``. Code in the model's folder is never run.

    Raises:
        UnknownArchitecture: mlx-lm has no such model.
        ModelBroken: configuration or weights do not fit the model.
    """
    plain_class: list[type[Any]] = []

    def fed_classes(config: Config) -> tuple[type[Any], type[Any]]:
        model_class, arguments_class = model_classes(config)
        plain_class.append(model_class)
        return _fed(model_class, weights), arguments_class

    with tempfile.TemporaryDirectory(prefix="parallax-") as bare:
        for file in folder.glob("*.json"):
            (Path(bare) / file.name).symlink_to(file.resolve())
        try:
            model: Model
            model, _ = mlx_lm.utils.load_model(
                Path(bare), lazy=True, strict=False, get_model_classes=fed_classes
            )
        except DEFECTS as error:
            raise ModelBroken(
                f"The files of {folder.name} do not make a model",
                f"{type(error).__name__}: {str(error)[:500]}",
                "Fetch the model again, or convert it with mlx_lm.convert",
                path=folder,
            ) from error
    model.__class__ = plain_class[0]
    return model


def _fed(model_class: type[Any], weights: Weights) -> type[Any]:
    clean: Callable[[Model, Weights], Weights] | None = getattr(model_class, "sanitize", None)

    def sanitize(self: Model, _: Weights) -> Weights:
        return clean(self, dict(weights)) if clean is not None else dict(weights)

    def load_weights(self: Model, items: list[tuple[str, mx.array]], strict: bool) -> Model:
        # "Not strict" only let the loader accept a folder without weights.
        return model_class.load_weights(self, items, strict=True)

    body = {
        "sanitize": sanitize,
        "load_weights": load_weights,
        "__module__": model_class.__module__,
    }
    return type(model_class.__name__, (model_class,), body)


def named(tree: Any) -> Weights:
    """The arrays of a tree, or of a model's parameters, by their paths."""
    leaves = cast(list[tuple[str, Any]], tree_flatten(tree))
    return {name: leaf for name, leaf in leaves if isinstance(leaf, mx.array)}


# ------------------------------------------------------------------------------------- caches


def new_caches(model: Model) -> Caches:
    """Empty caches for one sequence, one per slot of the model."""
    caches: Caches = make_prompt_cache(model)
    return caches


def parts(cache: Cache) -> tuple[Cache, ...]:
    """The simple caches inside one slot."""
    inner = getattr(cache, "caches", None)
    if inner is None:
        return (cache,)
    return tuple(part for c in inner for part in parts(c))


def kind(cache: Cache) -> tuple[Any, ...]:
    """What makes two slots interchangeable for masks and offsets."""
    return tuple(
        (type(p), getattr(p, "max_size", None), getattr(p, "chunk_size", None))
        for p in parts(cache)
    )


def is_filled(cache: Cache) -> bool:
    """Whether anything has been written into the slot."""
    return any(
        any(entry is not None for entry in p.cache) if _is_state(p) else not p.empty()
        for p in parts(cache)
    )


def can_merge(cache: Cache) -> bool:
    """Whether mlx-lm has a batch form of this slot's cache."""
    return all(hasattr(p, "merge") for p in parts(cache))


def window_tokens(part: Cache) -> int:
    """The most tokens a simple cache keeps; 0: all."""
    return int(getattr(part, "max_size", None) or getattr(part, "chunk_size", None) or 0)


def arrays(part: Cache) -> list[mx.array]:
    """The arrays a simple cache holds."""
    held = part.cache if _is_state(part) else (part.keys, part.values)
    found: list[mx.array] = []
    for entry in held:
        found += entry if isinstance(entry, (tuple, list)) else [entry]
    return [array for array in found if array is not None]


def position(caches: Caches) -> int:
    """How far these caches are, in padded tokens; 0 if none of them knows."""
    for cache in caches:
        for part in parts(cache):
            if hasattr(part, "offset"):
                offset = part.offset
                return offset if isinstance(offset, int) else int(part.size())
    return 0


def set_position(cache: Cache, tokens: int) -> None:
    """Moves an empty cache, of which only masks and offsets are asked, to a position."""
    for part in parts(cache):
        if hasattr(part, "offset"):
            part.offset = tokens


def _is_state(part: Cache) -> bool:
    return isinstance(getattr(part, "cache", None), list)
