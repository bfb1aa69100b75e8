"""What only a GPU can say, in one command: see __main__.py."""
