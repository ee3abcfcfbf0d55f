"""What is made of a trace: summary, picture, Perfetto; what if, foretell, plan."""
