"""What a run will do and need, said before a weight is loaded."""
