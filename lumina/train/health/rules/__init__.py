"""One file a health rule, found through lumina.config.registry.HEALTH_RULES."""
