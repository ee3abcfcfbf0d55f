"""What a function returned: slots, mappings, lists of tokens, refused batches, equal items."""
