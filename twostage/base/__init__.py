"""Records that travel, words, kinds, checks, and the as_completed that grows: what all others stand on."""
