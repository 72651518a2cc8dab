"""Parts of `python -m benchmarks.deploy_try`: an overlay's pods as hosts of this machine."""
