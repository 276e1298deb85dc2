"""What a `Llava` works with: the loaded models, their conversation, and how an answer comes about."""
