"""From messages and pictures to a prompt, and from an answer back to OpenAI's shape."""
