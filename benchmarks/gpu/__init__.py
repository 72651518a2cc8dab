"""The steps of `benchmarks.gpu_check`: what is checked and measured on a real GPU."""
