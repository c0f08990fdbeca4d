"""What families share: Family itself, config.json in Llama's form, and what Gemmas and Qwens have in common."""

from lumina.model.families.common import config_json
from lumina.model.families.common.family import Family, family_of, read_hf_config

__all__ = ["Family", "config_json", "family_of", "read_hf_config"]
