"""Benchmarks: programs, each with one command and a table as output. Never run by the tests."""
