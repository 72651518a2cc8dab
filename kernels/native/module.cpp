// Makes the library an importable extension module of the stable ABI, so that setuptools builds,
// places and tags it. Nothing is exposed to Python here: kernels/cpu_native.py calls the C
// functions with ctypes.
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr,
                                    nullptr,               nullptr,   nullptr, nullptr};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
