"""Triton's interpreter, in less than half of its time.

By itself it patches its language again at every call of a device function, makes a table of all dtypes at every
operation, and types of their shapes for every tensor. There are thousands of each in a launch, and it is the same every
time.
"""

from collections.abc import Callable

import numpy as np
from triton.runtime import interpreter


def look_dtypes_up_once() -> None:
    look_up, found = interpreter._get_np_dtype, {}

    def dtype(of: interpreter.tl.dtype) -> np.dtype:
        if of.name not in found:
            found[of.name] = look_up(of)
        return found[of.name]

    interpreter._get_np_dtype = dtype


def make_types_once() -> None:
    core = interpreter.tl.core
    make, made = core.block_type.__init__, {}
    type_of, found = core._type_for_tuple_values, {}

    def block_type(self, element_ty: core.dtype, shape) -> None:
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        if key not in made:
            make(self, element_ty, shape)
            made[key] = self.__dict__
        self.__dict__ = made[key]

    def of_values(values, fields=None) -> core.tuple_type:
        if fields or not all(type(value) is core.constexpr and type(value.value) is int for value in values):
            return type_of(values, fields)
        key = tuple(value.value for value in values)
        if key not in found:
            found[key] = type_of(values)
        return found[key]

    core.block_type.__init__, core._type_for_tuple_values = block_type, of_values


def patch_once_a_launch() -> None:
    patch, run, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def launch(self, *arguments, **options):
        patched.clear()
        return run(self, *arguments, **options)

    def once(function: Callable):
        module = id(function.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(function)  # the launch's own call takes it back in the end

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch
