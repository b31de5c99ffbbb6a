"""What travels into a bundle: the Python models of the Triton repository and the reference engine.

The folder is copied as the package `minitron_runtime`, so everything in it imports relatively and knows
nothing of the build side. Importing this package imports nothing else.
"""
