"""Long runs: state files that a run resumes from, files that are written whole or not at all, several processes.

It does not know what a run computes.
"""
