"""Reading pickles without running code that the file brings.

A pickle is a program: it may name any function that can be imported, and call it. :class:`AllowListUnpickler` resolves only
names on a list of data types (spaces, NumPy arrays and generators, Stable-Baselines3's buffers, noises and schedules, the
classes of ``torch.nn``, ``torch.optim`` and ``torch.distributions``, this package's policies, paths and sources) and refuses
every other name before anything is called. The types on the list do nothing but hold data when they are built, and a file may
set the state of what it builds only: not of the types themselves, and not a description of memory that NumPy would believe.

See https://docs.python.org/3/library/pickle.html#restricting-globals.
"""

import base64
import binascii
import enum
import importlib
import io
import json
import pickle
import types
import zipfile
from collections.abc import Callable, Collection
from typing import IO, Any, ClassVar

import numpy as np

NAMES = {
    "_codecs": {"encode"},  # bytes, in protocol 2
    "builtins": {
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "slice", "str", "tuple",
    },
    "collections": {"OrderedDict", "deque"},
    "copyreg": {"_reconstructor"},
    "numpy.core.multiarray": {"scalar"},
    "numpy.core.numeric": {"_frombuffer"},
    "numpy.random._pickle": {"__bit_generator_ctor", "__generator_ctor", "__randomstate_ctor"},
    "numpy.random.bit_generator": {"SeedSequence", "__pyx_unpickle_SeedSequence"},
    "rl_zoo3.utils": {"SimpleLinearSchedule"},
    "sb3_rfm.checkpoint": {"padded"},
    "stable_baselines3.common.running_mean_std": {"RunningMeanStd"},
    "stable_baselines3.common.type_aliases": {"TrainFreq", "TrainFrequencyUnit"},
    "stable_baselines3.common.utils": {"ConstantSchedule", "FloatSchedule", "LinearSchedule"},
    "stable_baselines3.common.vec_env.stacked_observations": {"StackedObservations"},
    "stable_baselines3.her.goal_selection_strategy": {"GoalSelectionStrategy"},
    "stable_baselines3.her.her_replay_buffer": {"HerReplayBuffer"},
    "torch": {"Size", "device", "dtype"},
    "torch._utils": {"_rebuild_parameter", "_rebuild_tensor_v2"},
    "torch.nn.parameter": {"Parameter"},
}  # fmt: skip
"""Names that may be resolved, by module."""

CLASSES_OF = (
    "gymnasium.spaces",
    "numpy.dtypes",
    "sb3_rfm.dict_observations",
    "sb3_rfm.paths",
    "sb3_rfm.policies",
    "sb3_rfm.sources",
    "stable_baselines3.common.buffers",
    "stable_baselines3.common.noise",
    "stable_baselines3.common.sb2_compat.rmsprop_tf_like",
    "stable_baselines3.common.torch_layers",
    "torch.distributions",
    "torch.nn.modules",
    "torch.optim",
)
"""Modules all of whose own classes may be resolved, with the modules inside them."""

BIT_GENERATORS = {"MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"}


TRUST = "If you know where the file comes from, pass trusted=True"


class RefusedError(ValueError):
    """A file asks for something that is not on the list."""


def resolve(module: str, name: str) -> Any:
    """What a pickle may refer to as ``module.name``.

    :param module: Module
    :param name: Name in it
    :raises RefusedError: for names that are not on the list
    """
    # Names that moved: Python 2's builtins (pickle protocol 2), and NumPy's private modules (2.0).
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    key = module.replace("numpy._core", "numpy.core", 1)
    if (key, name) in STAND_INS:
        return STAND_INS[key, name]
    if name in NAMES.get(key, ()):
        return getattr(importlib.import_module(module), name)
    if key == "numpy" or (key.startswith("numpy.random._") and name in BIT_GENERATORS):
        value = getattr(importlib.import_module(module), name, None)
        if isinstance(value, type) and (key != "numpy" or issubclass(value, np.generic)):
            return value
    if key == "torch" and isinstance(value := getattr(importlib.import_module("torch"), name, None), _torch_dtype()):
        return value
    if any(module == prefix or module.startswith(f"{prefix}.") for prefix in CLASSES_OF):
        value = vars(importlib.import_module(module)).get(name)
        # Only what the module itself defines: its imports are not meant.
        if isinstance(value, type) and value.__module__ == module:
            return value
    raise RefusedError(f"{module}.{name}")


def _load_storage(content: bytes) -> Any:
    """The numbers of a tensor: PyTorch's function for them unpickles whatever it is given, this one nothing but tensors."""
    return importlib.import_module("torch").load(io.BytesIO(content), weights_only=True)


def _torch_dtype() -> type:
    return importlib.import_module("torch").dtype


class _Array:
    """``numpy.ndarray`` as an argument; to call it could make an array of objects from any memory."""

    def __new__(cls, *args: Any) -> "_Array":
        raise RefusedError("a call of numpy.ndarray")


def _empty_array(kind: type, *_: Any) -> np.ndarray:
    """The array that NumPy's pickles begin with; they set its state then, which NumPy checks."""
    if kind is not _Array:
        raise RefusedError(f"an array that is a {kind.__name__}")
    return np.ndarray((0,), "b")


def _plain_dtype(*args: Any) -> np.dtype:
    """A dtype without fields."""
    dtype = np.dtype(*args)
    if dtype.fields is not None or dtype.subdtype is not None:
        raise RefusedError(f"the dtype {dtype}")
    return dtype


def _describes(state: Any, dtype: np.dtype) -> bool:
    """Whether a pickled state, (version, order, sub-array, names, fields, size, alignment, flags), is one of this dtype."""
    described = (None, None, None, *((dtype.itemsize, dtype.alignment) if dtype.kind in "SUV" else (-1, -1)), dtype.flags)
    return isinstance(state, tuple) and state[2:8] == described


STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _plain_dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("torch.storage", "_load_from_bytes"): _load_storage,
}
"""What takes the place of functions that believe what a file says."""

SHARED = (type, enum.Enum, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
"""What exists once in a process, whoever refers to it."""


class AllowListUnpickler(pickle._Unpickler):  # the one in Python: in that in C, BUILD cannot be overridden
    """An unpickler that resolves nothing but :func:`resolve` allows, and changes nothing but what it builds."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        return resolve(module, name)

    def load_build(self) -> None:
        state, built = self.stack[-1], self.stack[-2]
        if isinstance(built, SHARED):
            raise RefusedError(f"a change of {getattr(built, '__name__', built)}")
        if isinstance(built, np.dtype) and not _describes(state, built):
            raise RefusedError(f"a change of the dtype {built}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


Unpickler = AllowListUnpickler
"""The name under which ``torch.load(pickle_module=...)`` looks for it."""


def load(file: IO[bytes], what: str = "file") -> Any:
    """``pickle.load`` with the allow-list.

    :param file: A binary file
    :param what: What to call the file in errors
    :raises RefusedError: where the file refers to anything that is not on the list
    :raises ValueError: where it is not a pickle
    """
    try:
        return AllowListUnpickler(file).load()
    except RefusedError as error:
        raise RefusedError(refusal(what, str(error))) from None
    except Exception as error:
        # A broken pickle may fail in any way; which one says nothing to the caller.
        reason = f"no pickle has the opcode {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"The {what} cannot be read: it is truncated, damaged or something else ({reason}).") from error


def read_model(
    file: IO[bytes], name: str, custom_objects: Collection[str] = (), trusted: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a model saved by Stable-Baselines3, except for its tensors, without running code of its own.

    :param file: The zip archive
    :param name: Its name, for errors
    :param custom_objects: Members that the caller replaces: they are not read
    :param trusted: Leave pickled members to Stable-Baselines3
    :return: All members by name, as JSON, and those among them that are pickled, as what they hold
    :raises RefusedError: where a member refers to anything that is not on the list
    :raises ValueError: where the file is not a saved model
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if "data" not in names or "policy.pth" not in names:
                raise ValueError(
                    f"{name} is not a saved model, or it is truncated: it has no 'data' and 'policy.pth', but {names}."
                )
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{name} is damaged: the checksum of '{damaged}' does not match.")
            data = json.loads(archive.read("data"))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not a saved model: it wasn't a zip-file, or it is truncated ({error}).") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is not a saved model: its 'data' is not JSON ({error}).") from error
    if not isinstance(data, dict):
        raise ValueError(f"{name} is not a saved model: its 'data' is not a JSON object.")
    objects: dict[str, Any] = {}
    if trusted:
        return data, objects
    if "env" in data:
        # SB3 saves none, but would make one from its name, which may name any module to import.
        raise RefusedError(f"{name} brings an environment, {data['env']!r}. {TRUST}.")
    for member, value in data.items():
        if isinstance(value, dict) and ":serialized:" in value and member not in custom_objects:
            try:
                content = base64.b64decode(value[":serialized:"])
            except (TypeError, binascii.Error) as error:
                raise ValueError(f"{name} is damaged: its member '{member}' is not base64.") from error
            try:
                objects[member] = load(io.BytesIO(content), f"member '{member}' of {name}")
            except RefusedError as error:
                if member != "policy_class":
                    raise
                raise RefusedError(
                    f"{error} The policy is none of sb3_rfm: perhaps another algorithm saved the file."
                ) from None
    return data, objects


def repack_torch_file(file: IO[bytes], name: str) -> io.BytesIO:
    """What ``torch.save`` wrote, an archive of one pickle and tensors, as an archive of ours.

    PyTorch has a reader of its own for archives. Given the file as it is, it might find in it what this one does not.

    :param file: The file
    :param name: Its name, for errors
    :return: The same members
    :raises ValueError: for any other file; TorchScript, which ``torch.load`` would run, is refused too
    """
    repacked = io.BytesIO()
    try:
        with zipfile.ZipFile(file) as old, zipfile.ZipFile(repacked, "w") as new:
            members = {member.rpartition("/")[2] for member in old.namelist()}
            if "data.pkl" not in members or "constants.pkl" in members:
                raise ValueError(f"{name} does not hold a network saved by Stable-Baselines3.")
            for member in old.namelist():
                new.writestr(member, old.read(member))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} was not written by torch.save, or it is truncated ({error}).") from error
    repacked.seek(0)
    return repacked


def refusal(what: str, reference: str) -> str:
    """Text of the error for a reference that is not on the list."""
    return (
        f"The {what} refers to {reference}, which is not among the data types that are read without trust. {TRUST}; members "
        "of a saved model may also be replaced by custom_objects."
    )
