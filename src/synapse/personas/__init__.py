"""Who the personas are: their settings, their conversations, and one turn of a chat."""
