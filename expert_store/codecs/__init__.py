"""Error-bounded codecs of weights, and the lossless wire form of low-bit records."""
