"""How a job is put together, what drives it, and the caller's half."""
