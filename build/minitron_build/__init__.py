"""Builds, packages and serves Llama-3.1-Minitron with TensorRT-LLM on Triton.

The artefacts are the interfaces: HF checkpoint -> TensorRT-LLM checkpoint -> engine -> bundle. Each module
owns one of them. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
