"""Prefixes of arrays that share the arrays' memory: the weights of a higher prune rate, for no bytes.

JAX has no views. DLPack hands over an array's memory with its shape, and a shorter leading axis describes a prefix.
"""

from __future__ import annotations

import ctypes
from typing import Any

import jax
from jaxtyping import Array, Shaped


class _Tensor(ctypes.Structure):
    """DLPack's DLTensor, with which a DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _Prefix:
    """What `jax.dlpack.from_dlpack` reads: the first entries of an array."""

    def __init__(self, array: Any, count: int):
        self._array, self._count = array, count

    def __dlpack__(self, *, stream: Any = None, **unused: Any) -> Any:
        capsule = self._array.__dlpack__(stream=stream)
        ctypes.cast(_pointer(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents.shape[0] = self._count
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def prefix(array: Shaped[Array, "n ..."], count: int) -> Shaped[Array, "count ..."]:
    """The first entries of an array's leading axis, in the same memory, which stays for as long as either is held.

    Args:
        array: on any device.
        count: from 0 to the array's own.

    Returns:
        An array of `count` entries; the array itself where these are all.
    """
    if not 0 <= count <= array.shape[0]:
        raise ValueError(f"an array of {array.shape[0]} entries has no prefix of {count}")
    if count == array.shape[0] or array.size == 0:
        return array[:count] if count < array.shape[0] else array
    return jax.dlpack.from_dlpack(_Prefix(array, count)) if count else array[:0]


def prefix_tree(whole: Any, shapes: Any) -> Any:
    """A tree of arrays cut along leading axes to the shapes of another, which gives the result its structure.

    Args:
        whole: arrays.
        shapes: as many arrays, or jax.ShapeDtypeStruct, whose shapes differ by smaller leading axes only.

    Returns:
        Prefixes in the structure of `shapes`.

    Raises:
        ValueError: some array has no such prefix.
    """
    wanted, tree = jax.tree.flatten(shapes)
    found = []
    for array, shape in zip(jax.tree.leaves(whole), wanted, strict=True):
        if array.shape == shape.shape:
            found.append(array)
            continue
        if array.shape[1:] != shape.shape[1:] or array.dtype != shape.dtype:
            raise ValueError(f"{shape.dtype}{shape.shape} is no prefix of {array.dtype}{array.shape}")
        found.append(prefix(array, shape.shape[0]))
    return jax.tree.unflatten(tree, found)
