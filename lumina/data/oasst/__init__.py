"""OpenAssistant message trees -> conversations and preference pairs."""
