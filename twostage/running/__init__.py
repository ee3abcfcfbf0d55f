"""Where attempts run: pools, loops, processes, an executor of the user's."""
