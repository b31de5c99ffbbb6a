"""The bundle: manifest, what it is bound to, which of several to serve, what `inspect` says of it."""
