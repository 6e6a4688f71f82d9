"""The HTTP surface: OpenAI's API over personas, every command as a route, API keys, health."""
