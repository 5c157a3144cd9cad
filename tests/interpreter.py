"""Triton's interpreter, in less than half of its time: it patches its language once a launch.

By itself it does so again at every call of a device function, and there are thousands in a launch; what it patches
is the same each time.
"""

from collections.abc import Callable

from triton.runtime import interpreter


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
