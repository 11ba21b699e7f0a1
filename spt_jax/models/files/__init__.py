"""Where models lie and how their files are read."""
