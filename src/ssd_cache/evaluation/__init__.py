"""Measures the quality of images that were generated with a cache policy.

`shapes` is the exact benchmark on the bundled model; it writes result lines to a folder, and `tables` and `plots` read
them. `geneval` and `dpg` are public benchmarks, scored by the rules of their authors. Speed is measured in `bench`.
"""
