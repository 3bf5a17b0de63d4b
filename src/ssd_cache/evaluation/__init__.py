"""How good pictures are that were drawn with a cache policy.

`shapes` is the exact benchmark on the bundled model, its results lines in a folder that `tables` and `plots` read;
`geneval` and `dpg` are public benchmarks by their rules. How fast a policy is, is `bench`.
"""
