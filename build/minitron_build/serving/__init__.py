"""`tritonserver` as a process, and the verbs that run it."""
