"""`minitron bench`: a load generator for text models behind Triton's gRPC, and what its numbers mean.

A run is data before it is a load: `workload` (prompts and lengths), `load` (how many at once, or how many
a second), then `generator` (drives the client), `measure` (records to numbers), `result` (one document),
`report` and `comparison` (read that document). Only `generator` and `sweep` know the client.
"""
