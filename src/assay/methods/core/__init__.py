"""What papers share, by subject. No module here imports a paper's."""
