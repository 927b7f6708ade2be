"""The only package that knows the inside of transformers' caches."""
