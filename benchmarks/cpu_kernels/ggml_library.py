"""ggml through ctypes: those functions of llama-cpp-python's libraries that a product needs.

Owns pointers and their types. Source: ggml.h, ggml-backend.h, ggml-cpu.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

_POINTER, _INT, _INT64, _SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t
F32 = 0  # enum ggml_type
TYPES = {"Q4_0": 2, "Q5_0": 6, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "IQ4_NL": 20}
"""enum ggml_type of what is compared."""


class InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


class ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", ctypes.c_bool * 512),
        ("n_threads", _INT),
        ("prio", _INT),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    )


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _INT64),
        ("blck_size_interleave", _INT64),
        ("type_size", _SIZE),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, _INT64)),
        ("from_float_ref", _POINTER),
    )


_Log = ctypes.CFUNCTYPE(None, _INT, ctypes.c_char_p, _POINTER)
_SILENCE = _Log(lambda level, text, data: None)
"""ggml tells of every tensor that it repacks."""

_BASE = {  # libggml-base: name -> (result, arguments)
    "ggml_log_set": (None, _Log, _POINTER),
    "ggml_init": (_POINTER, InitParams),
    "ggml_free": (None, _POINTER),
    "ggml_new_tensor_2d": (_POINTER, _POINTER, _INT, _INT64, _INT64),
    "ggml_mul_mat": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_swiglu_split": (_POINTER, _POINTER, _POINTER, _POINTER),
    "ggml_new_graph": (_POINTER, _POINTER),
    "ggml_build_forward_expand": (None, _POINTER, _POINTER),
    "ggml_get_data": (_POINTER, _POINTER),
    "ggml_row_size": (_SIZE, _INT, _INT64),
    "ggml_quantize_chunk": (
        _SIZE, _INT, _POINTER, _POINTER, _INT64, _INT64, _INT64, _POINTER,
    ),
    "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), _INT),
    "ggml_backend_alloc_ctx_tensors": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_POINTER, _POINTER, _POINTER),
    "ggml_backend_buffer_free": (None, _POINTER),
    "ggml_backend_tensor_set": (None, _POINTER, _POINTER, _SIZE, _SIZE),
    "ggml_backend_graph_compute": (_INT, _POINTER, _POINTER),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, _POINTER, _POINTER),
    "ggml_backend_dev_backend_reg": (_POINTER, _POINTER),
    "ggml_backend_reg_get_proc_address": (_POINTER, _POINTER, ctypes.c_char_p),
    "ggml_backend_get_default_buffer_type": (_POINTER, _POINTER),
    "ggml_backend_get_device": (_POINTER, _POINTER),
    "ggml_threadpool_params_default": (ThreadpoolParams, _INT),
}  # fmt: skip
_CPU = {
    "ggml_backend_cpu_init": (_POINTER,),
    "ggml_backend_cpu_set_n_threads": (None, _POINTER, _INT),
    "ggml_backend_cpu_set_threadpool": (None, _POINTER, _POINTER),
    "ggml_threadpool_new": (_POINTER, ctypes.POINTER(ThreadpoolParams)),
    "ggml_cpu_has_avx512_vnni": (_INT,),
    "ggml_cpu_has_avx512": (_INT,),
    "ggml_cpu_has_avx_vnni": (_INT,),
    "ggml_cpu_has_avx2": (_INT,),
}


class Ggml:
    """The loaded libraries with one CPU backend of one thread that lives as long as the process."""

    def __init__(self, folder: Path) -> None:
        # Each needs the one before it; the file names carry no version there.
        base, cpu = (
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            for name in ("libggml-base.so", "libggml-cpu.so")
        )
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (result, *arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        self.call("log_set", _SILENCE, None)
        self.backend = self.call("backend_cpu_init")
        self.call("backend_cpu_set_n_threads", self.backend, 1)
        params = self.call("threadpool_params_default", 1)
        pool = self.call("threadpool_new", ctypes.byref(params))
        self.call("backend_cpu_set_threadpool", self.backend, pool)
        self.device = self.call("backend_get_device", self.backend)

    def call(self, name: str, *arguments: Any) -> Any:
        """ggml_NAME(*arguments)."""
        return getattr(self, name)(*arguments)

    def isa(self) -> str:
        """The instruction set this build was compiled for: ggml picks it at build time."""
        for name in ("avx512_vnni", "avx_vnni", "avx512", "avx2"):
            if self.call(f"cpu_has_{name}"):
                return name
        return "baseline"

    def context(self, num_tensors: int) -> int:
        """A context for the descriptions of so many tensors and one graph; data lies elsewhere."""
        params = InitParams((num_tensors + 300) * 512 + (1 << 20), None, True)
        return self.call("init", params)

    def plain_buffers(self) -> int:
        """The buffer type that keeps the file's layout."""
        return self.call("backend_get_default_buffer_type", self.backend)

    def repacked_buffers(self) -> int | None:
        """The buffer type that rearranges rows for wider products; None where there is none."""
        registry = self.call("backend_dev_backend_reg", self.device)
        address = self.call(
            "backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts"
        )
        if not address:
            return None
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(_POINTER), _POINTER)(address)(self.device)
        return extra[0] if extra else None


@functools.cache
def library() -> Ggml | None:
    """ggml, or None when llama-cpp-python is not installed."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Ggml(Path(spec.submodule_search_locations[0]) / "lib")
