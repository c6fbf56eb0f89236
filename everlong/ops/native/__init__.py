"""Kernels for the CPU: C++ that is built on the user's machine when it is first needed, and what calls it.

kernels/      the C++ sources, free of torch: one file an operator over simd.h (vectors), products.h (matrix products
              in the cache), tiles.h (the same of bfloat16 numbers), parallel.h (threads, scratch memory) and
              arguments.h (how Python calls)
build.py      compiles, caches and loads them
call.py       calls a kernel with tensors and numbers
the others    one file an operator: shapes and memory of the results, torch.library, gradients
"""
