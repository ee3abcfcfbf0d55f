"""A job whose calls are shards, on an executor of the user's."""
