"""Triton's interpreter under newer versions of numpy, which no longer turn arrays of one element into an index."""

import os


def install() -> None:
    """Make kernels run in the interpreter; call before louver.kernels.triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched
