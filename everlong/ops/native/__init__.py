"""Kernels for the CPU: C++ that is built on the user's machine when it is first needed, and what calls it.

kernels/      the C++ sources, free of torch: a file or two an operator over simd.h (vectors), products.h (products of
              matrices in the cache), parallel.h (threads, scratch memory) and arguments.h (how Python calls)
build.py      compiles, caches and loads them
call.py       calls a kernel with tensors and numbers
the others    one file an operator: shapes and memory of the results, torch.library, gradients
"""
