"""SQLite: what is recorded is never asked again."""
