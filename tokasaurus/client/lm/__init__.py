"""The language model client: what programs of agents call, configured in YAML.

from tokasaurus.client.lm.lm_factory import get_lm_client

lm = get_lm_client({"model": "toka:default", "base_url": "http://localhost:10210"})
lm.call("Answer briefly.", "What is 3 + 4?")
"""

from tokasaurus.client.lm.call_log import enable_json_logging, json_log_context
from tokasaurus.client.lm.config import LMConfig, TokasaurusConfig
from tokasaurus.client.lm.language_model import LanguageModel, LLMResponseMetrics
from tokasaurus.client.lm.lm_factory import get_lm_client
from tokasaurus.client.lm.tokasaurus_client import LMReply, TokasaurusClient
from tokasaurus.client.lm.totals import TotalUsage
from tokasaurus.errors import GenerationTruncatedError

__all__ = [
    "GenerationTruncatedError",
    "LLMResponseMetrics",
    "LMConfig",
    "LMReply",
    "LanguageModel",
    "TokasaurusClient",
    "TokasaurusConfig",
    "TotalUsage",
    "enable_json_logging",
    "get_lm_client",
    "json_log_context",
]
