"""What keeps a crash of a kernel from happening twice."""
