"""The CPU kernels beside what a user would pick instead, out of DRAM, on one thread."""
