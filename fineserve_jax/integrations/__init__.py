"""Other projects' interfaces to this engine: each file is one, and imports that project, which is an extra."""
