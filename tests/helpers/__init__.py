"""Shared by the tests: tiny models and checkpoints, slow references, servers and child processes."""
