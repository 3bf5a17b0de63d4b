"""Long runs: state files that a run resumes from, the default batch size, and runs shared by several processes.

This package is independent of what a run computes.
"""
