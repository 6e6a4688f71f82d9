"""What the tiny kernel imports."""

comptime FACTOR = 2
