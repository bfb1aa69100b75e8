"""What a user may say: the flags, how they are read, which go together."""
