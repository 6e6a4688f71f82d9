"""OpenAI's API: what a request asks for, the answers being generated, and the shapes they are sent in."""
