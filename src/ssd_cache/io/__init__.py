"""Input and output for untrusted files and text: checked readers, printable messages, escaping, atomic writes.

This package does not interpret the contents of files.
"""
