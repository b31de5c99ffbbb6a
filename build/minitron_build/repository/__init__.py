"""The Triton model repository inside a bundle, written through the protobuf message."""
