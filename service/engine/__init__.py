"""Batching: requests of token ids in, deltas of token ids out; no HTTP, no text."""
