"""Values of a network's configuration <-> JSON: the one walker behind fingerprints and records."""

import base64
import dataclasses
import enum
import functools
import hashlib
import importlib
import json
import math
import pickle
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nnopt.core.modules import configuration
from nnopt.errors import RecordError

# Functions are recorded by the public name under which a user finds them, which outlives private moves.
_PUBLIC_HOMES = ("flax.linen", "jax.nn", "jax.nn.initializers", "jax.numpy", "jax.lax")
# Closures made by these modules are recorded as the call that makes them; nothing else is ever called on decoding.
_FACTORIES = ("jax.nn.initializers", "flax.linen.initializers")


class _Encoder:
    """Encodes one root value; `strict` refuses what cannot be decoded again."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        # In order of first appearance: a second one is a reference.
        self.modules: list[nn.Module] = []

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return _enum(value) if isinstance(value, enum.Enum) else value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, enum.Enum):
            return _enum(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, jax.ShapeDtypeStruct):
            return {"spec": list(value.shape), "dtype": value.dtype.name}
        if isinstance(value, list):
            return {"list": [self(v) for v in value]}
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return [self(v) for v in value]
        if isinstance(value, Mapping):
            return {"dict": [[self(k), self(v)] for k, v in value.items()]}
        if isinstance(value, frozenset | set):
            return {"set": sorted((self(v) for v in value), key=json.dumps)}
        if isinstance(value, np.dtype) or _is_scalar_type(value):
            return {"dtype": jnp.dtype(value).name}
        if isinstance(value, np.ndarray | jax.Array) and not isinstance(value, jax.core.Tracer):
            array = np.asarray(value)
            data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
            return {"array": data, "shape": list(array.shape), "dtype": array.dtype.name}
        if isinstance(value, type):
            return {"class": self.importable(value)}
        if isinstance(value, functools.partial):
            return {
                "partial": self(value.func),
                "args": [self(v) for v in value.args],
                "kwargs": {k: self(v) for k, v in value.keywords.items()},
            }
        if hasattr(value, "encoded"):
            if self.strict:
                raise RecordError(
                    "a rewritten network inside another network cannot be recorded; rewrite the outer network instead"
                )
            return value.encoded()
        if dataclasses.is_dataclass(value):
            return {"dataclass": self.importable(type(value)), "fields": self.fields(value)}
        if callable(value):
            return self.function(value)
        return self.opaque(value)

    def module(self, module: nn.Module) -> Any:
        for index, seen in enumerate(self.modules):
            if seen is module:
                return {"shared": index}
        self.modules.append(module)
        return {"module": self.importable(type(module)), "fields": self.fields(module)}

    def fields(self, value: Any) -> dict[str, Any]:
        """The fields that differ from their defaults: a new field with a default in a library changes nothing."""
        values = (
            configuration(value)
            if isinstance(value, nn.Module)
            else {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        )
        defaults = {f.name: f for f in dataclasses.fields(value)}
        encoded = {}
        for name, v in values.items():
            field = defaults[name]
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is not dataclasses.MISSING and (
                v is default or _Encoder(strict=False)(v) == _Encoder(strict=False)(default)
            ):
                continue
            encoded[name] = self(v)
        return encoded

    def importable(self, thing: Any) -> str:
        name = _name_of(thing)
        if self.strict:
            try:
                found = _find(name)
            except RecordError:
                found = None
            if found is not thing:
                raise RecordError(
                    f"{name} cannot be recorded: it is not importable under that name; define it at the top level of a module"
                )
        return name

    def function(self, function: Any) -> Any:
        for home in _PUBLIC_HOMES:
            name = getattr(function, "__name__", "")
            if name and getattr(importlib.import_module(home), name, None) is function:
                return {"function": f"{home}:{name}"}
        try:
            if _find(_name_of(function)) is function:
                return {"function": _name_of(function)}
        except RecordError:
            pass
        factory = self.factory_call(function)
        if factory is not None:
            return factory
        return self.opaque(function)

    def factory_call(self, function: Any) -> Any:
        """`nn.initializers.normal(0.1)` -> the call that made it, if repeating it gives the same closure."""
        qualname = getattr(function, "__qualname__", "")
        if ".<locals>." not in qualname or not isinstance(function, types.FunctionType):
            return None
        free = dict(zip(function.__code__.co_freevars, _cells(function), strict=True))
        for home in _FACTORIES:
            maker = getattr(importlib.import_module(home), qualname.split(".")[0], None)
            if maker is None or maker.__module__ != function.__module__:
                continue
            accepted = maker.__code__.co_varnames[: maker.__code__.co_argcount]
            kwargs = {k: v for k, v in free.items() if k in accepted}
            try:
                again = maker(**kwargs)
            except TypeError:
                continue
            same = again.__code__ is function.__code__ and (
                _Encoder(strict=False)(tuple(_cells(again)))
                == _Encoder(strict=False)(tuple(_cells(function)))
            )
            if same:
                return {
                    "call": f"{home}:{maker.__name__}",
                    "kwargs": {k: self(v) for k, v in kwargs.items()},
                }
        return None

    def opaque(self, value: Any) -> Any:
        """What tells `value` from others of its kind, for a fingerprint; never decoded."""
        if self.strict:
            raise RecordError(
                f"a value of the network cannot be recorded: {value!r}; use a named function or a frozen dataclass instead"
            )
        if isinstance(value, types.MethodType):
            return {"opaque": _name_of(value.__func__), "of": self(value.__self__)}
        if isinstance(value, types.FunctionType):
            code = value.__code__
            text = repr(
                (
                    code.co_code,
                    code.co_names,
                    [c for c in code.co_consts if not hasattr(c, "co_code")],
                )
            )
            return {
                "opaque": _name_of(value),
                "code": hashlib.sha256(text.encode()).hexdigest(),
                "closure": [self(v) for v in _cells(value)],
                "defaults": self(value.__defaults__),
            }
        if hasattr(value, "__wrapped__"):
            return {"opaque": type(value).__name__, "of": self(value.__wrapped__)}
        try:
            return {
                "opaque": _name_of(type(value)),
                "data": hashlib.sha256(pickle.dumps(value)).hexdigest(),
            }
        except Exception:  # a foreign object may refuse to be pickled in any way it likes
            return {"opaque": _name_of(type(value)), "id": id(value)}


def encode(value: Any, *, strict: bool) -> Any:
    """A configuration value as JSON.

    Args:
        value: modules, dataclasses, functions, dtypes, arrays, containers and plain values, nested.
        strict: refuse what `decode` could not bring back, instead of describing it.

    Raises:
        RecordError: `strict`, and a value is not importable, such as a lambda.
    """
    return _Encoder(strict)(value)


def digest(encoded: Any) -> str:
    """SHA-256 of an encoding, as 64 hexadecimal digits."""
    text = json.dumps(encoded, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def decode(encoded: Any) -> Any:
    """The value that `encode(value, strict=True)` was made from.

    Raises:
        RecordError: the JSON has an unknown form, or names something that is not there.
    """
    return _Decoder()(encoded)


class _Decoder:
    def __init__(self) -> None:
        self.modules: list[Any] = []

    def __call__(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list):
            return tuple(self(v) for v in value)
        if not isinstance(value, dict):
            raise RecordError(f"a record cannot hold {value!r}; expected JSON written by nnopt")
        for key, (others, method) in _FORMS.items():
            if key in value:
                if set(value) != {key, *others}:
                    raise RecordError(
                        f"a record entry with {key!r} must have exactly the keys {sorted({key, *others})}, got {sorted(value)}"
                    )
                try:
                    return method(self, value)
                except RecordError:
                    raise
                except (TypeError, ValueError, KeyError, IndexError, AttributeError) as e:
                    raise RecordError(f"a record entry with {key!r} is malformed: {e}") from e
        raise RecordError(
            f"a record entry has none of the known forms ({', '.join(_FORMS)}): keys {sorted(value)}"
        )

    def module(self, v: dict[str, Any]) -> nn.Module:
        index = len(self.modules)
        self.modules.append(None)
        cls = _find(v["module"])
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise RecordError(f"{v['module']} is not a linen module class")
        made = cls(**{k: self(f) for k, f in v["fields"].items()}, parent=None)
        self.modules[index] = made
        return made

    def dataclass(self, v: dict[str, Any]) -> Any:
        cls = _find(v["dataclass"])
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise RecordError(f"{v['dataclass']} is not a dataclass")
        return cls(**{k: self(f) for k, f in v["fields"].items()})

    def function(self, v: dict[str, Any]) -> Any:
        found = _find(v["function"])
        if not callable(found):
            raise RecordError(f"{v['function']} is not a function")
        return found

    def call(self, v: dict[str, Any]) -> Any:
        home, _, maker = v["call"].partition(":")
        if home not in _FACTORIES or not maker.isidentifier() or maker.startswith("_"):
            raise RecordError(
                f"a record may only call initializers of {' or '.join(_FACTORIES)}, not {v['call']}"
            )
        return _find(v["call"])(**{k: self(x) for k, x in v["kwargs"].items()})

    def type(self, v: dict[str, Any]) -> Any:
        found = _find(v["class"])
        if not isinstance(found, type):
            raise RecordError(f"{v['class']} is not a class")
        return found

    def array(self, v: dict[str, Any]) -> np.ndarray:
        flat = np.frombuffer(base64.b64decode(v["array"]), jnp.dtype(v["dtype"]))
        return flat.reshape(v["shape"]).copy()


_FORMS: dict[str, tuple[tuple[str, ...], Callable[[_Decoder, dict[str, Any]], Any]]] = {
    "module": (("fields",), _Decoder.module),
    "dataclass": (("fields",), _Decoder.dataclass),
    "shared": ((), lambda d, v: d.modules[v["shared"]]),
    "float": ((), lambda d, v: float(v["float"])),
    "list": ((), lambda d, v: [d(x) for x in v["list"]]),
    "dict": ((), lambda d, v: {d(k): d(x) for k, x in v["dict"]}),
    "set": ((), lambda d, v: frozenset(d(x) for x in v["set"])),
    "spec": (
        ("dtype",),
        lambda d, v: jax.ShapeDtypeStruct(tuple(v["spec"]), jnp.dtype(v["dtype"])),
    ),
    "array": (("shape", "dtype"), _Decoder.array),
    "dtype": ((), lambda d, v: jnp.dtype(v["dtype"])),
    "enum": (("name",), lambda d, v: _find(v["enum"])[v["name"]]),
    "class": ((), _Decoder.type),
    "function": ((), _Decoder.function),
    "call": (("kwargs",), _Decoder.call),
    "partial": (
        ("args", "kwargs"),
        lambda d, v: functools.partial(
            d(v["partial"]), *map(d, v["args"]), **{k: d(x) for k, x in v["kwargs"].items()}
        ),
    ),
}


def _is_scalar_type(value: Any) -> bool:
    """`jnp.float32` and `np.float32`, which are not `np.dtype`s but mean one."""
    if isinstance(value, type):
        return issubclass(value, np.generic)
    return type(value).__name__ == "_ScalarMeta" or (
        hasattr(value, "dtype") and isinstance(value.dtype, np.dtype) and callable(value)
    )


def _cells(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _find(name: str) -> Any:
    """The object called `package.module:Qualified.name`."""
    module_name, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as e:
        raise RecordError(
            f"{name!r} is not there to import: {e}; install or import what defines it"
        ) from e
    return found


def _enum(value: enum.Enum) -> dict[str, str]:
    return {"enum": _name_of(type(value)), "name": value.name}
