"""Tensors: a batch in, one token a sampled row out; knows nothing of requests."""
