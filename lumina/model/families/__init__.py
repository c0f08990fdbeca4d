"""Model families: one file each, named after transformers' `model_type`, with one `FAMILY`.

A family says in what its decoder differs from Llama's and how transformers writes it, names and configuration both
ways. What most have in common is Family itself (`common/`); a family overrides the method in which it differs. Another
package adds one under the entry points `lumina.families`. Nothing here loads torch: the configuration asks families for
their parameters' count.
"""

from lumina.model.families.common import Family, family_of, read_hf_config
from lumina.model.fused import RowSlice

__all__ = ["Family", "RowSlice", "family_of", "read_hf_config"]
