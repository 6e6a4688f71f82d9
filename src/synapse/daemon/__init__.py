"""Model workers: engines in processes of their own, watched, restarted, and asked as if they were in this process."""
