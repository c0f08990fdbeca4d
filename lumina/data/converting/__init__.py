"""Files -> JSON lines of conversations: `process-oasst`, `validate-data --fix`."""
