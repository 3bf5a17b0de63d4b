"""Importing this module exempts all objects that exist from garbage collection.

A collection visits every object, half a million after the imports. The library collects before it measures memory and
after each batch of images, which took half of the time of a small run.
"""

import gc

gc.collect()
gc.freeze()
