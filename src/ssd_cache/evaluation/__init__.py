"""Measures the quality of images that were generated with a cache policy.

`exact` has the exact benchmarks on the bundled models; their runs write result lines to a folder, and `tables` and
`plots` read them. `geneval` and `dpg` are public benchmarks, scored by the rules of their authors. Speed is measured in
`bench`.
"""
