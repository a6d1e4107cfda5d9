"""What can evaluate energy and gradient of a bundle: one file a runtime.

A runtime module has `open_runtime(bundle, device, batch_size)`, which raises ValueError where its library, a
device or an engine is missing.
"""

from alpenglow.export.runtimes.base import Runtime, open_runtime, runtime_names

__all__ = ["Runtime", "open_runtime", "runtime_names"]
