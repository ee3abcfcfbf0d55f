"""The coordinator, a stage's line, what is read, what is handed over."""
