"""Publishing from anywhere, and recording it in the log of the home."""
