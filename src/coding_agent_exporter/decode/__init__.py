"""One module per dialect: takes bytes, gives what they say, or why they were thrown away."""
