"""What a failure means: tenacity asked; transient, throttling or lasting; how long an answer asks to wait."""
