"""The demonstration: an HTTP API on this machine, its client, and the ways that are compared."""
