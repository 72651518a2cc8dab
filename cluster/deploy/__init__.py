"""From deploy/'s kustomizations to documents that were filled in and checked."""
