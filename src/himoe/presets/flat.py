"""What the presets that choose among all experts at once share."""

from himoe.errors import ConfigError


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raise `ConfigError` unless 1 ≤ K ≤ E."""
    if not 1 <= top_k <= num_experts:
        raise ConfigError(f"top_k = {top_k} must be between 1 and num_experts = {num_experts}")
