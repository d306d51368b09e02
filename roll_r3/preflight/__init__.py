"""What is checked and planned before anything starts. No engine is imported, nothing is downloaded, no code is run."""
