"""Parts of `benchmarks.offload`: two hosts, what runs on them, what is compared, the page."""
