"""A stand-in for the package of TensorRT-LLM 1.2.1 where there is no GPU: its executor bindings alone."""

__version__ = "1.2.1"
