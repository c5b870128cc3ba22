"""GLM-4-0414 and GLM-Z1: GLM with norms after both branches too."""

from tmjax.models.families import glm
from tmjax.models.families.base import Family

FAMILY = Family("glm4", "Glm4ForCausalLM", glm.FIELDS, glm.params, {"post_norm": True}, glm.read, glm.write)
