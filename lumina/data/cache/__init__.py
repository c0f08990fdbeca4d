"""The prepared data on disk: Arrow files over memory maps, written whole or not at all."""
