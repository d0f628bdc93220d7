"""What several files of tests use: a module for each kind of thing."""
