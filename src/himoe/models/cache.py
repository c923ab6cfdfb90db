"""What attention remembers of the tokens already read, so that text can go on without being read again."""

from jaxtyping import Bool, Int
from torch import Tensor

from himoe.errors import ConfigError


class Buffer:
    """Rows of tokens to which more are added at the end; the memory behind them doubles when it is full.

    Args:
        dim: the dimension that counts tokens.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.length = dim, 0
        self._memory: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Add `new`, and return all there is; raises ConfigError for another number of rows than before."""
        if self._memory is not None and len(new) != len(self._memory):
            raise ConfigError(f"KVCache: {len(new)} rows after {len(self._memory)}; make a new cache for other rows")
        end = self.length + new.shape[self.dim]
        if self._memory is None or end > self._memory.shape[self.dim]:
            shape = list(new.shape)
            shape[self.dim] = max(end, 2 * self.length)
            larger = new.new_empty(shape)
            if self._memory is not None:
                larger.narrow(self.dim, 0, self.length).copy_(self._memory.narrow(self.dim, 0, self.length))
            self._memory = larger
        self._memory.narrow(self.dim, self.length, end - self.length).copy_(new)
        self.length = end
        return self._memory.narrow(self.dim, 0, end)


class KVCache:
    """Keys, values, padding and documents of one batch: made for its first tokens, given to every later call.

    Args:
        num_layers: attention layers of the model.

    >>> import torch
    >>> from himoe.models import DecoderLM, KVCache
    >>> from himoe.nn import SwiGLU
    >>> model = DecoderLM(vocab_size=9, dim=8, num_layers=2, num_heads=2, feed_forward=lambda _: SwiGLU(8, 16)).eval()
    >>> cache, text = KVCache(num_layers=2), torch.tensor([[1, 2, 3, 4]])
    >>> with torch.no_grad():
    ...     first, _ = model(text[:, :3], cache=cache)
    ...     last, _ = model(text[:, 3:], cache=cache)
    >>> last.shape, cache.length
    (torch.Size([1, 1, 9]), 4)
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._layers = [(Buffer(2), Buffer(2)) for _ in range(num_layers)]
        self._mask, self._documents = Buffer(1), Buffer(1)
        self._given: tuple[bool, bool] | None = None

    @property
    def length(self) -> int:
        """Positions read so far, padding included."""
        return self._layers[0][0].length

    def layer(self, index: int) -> tuple[Buffer, Buffer]:
        """Return the keys and values of one layer, (B, heads, positions, width)."""
        return self._layers[index]

    def remember(
        self, mask: Bool[Tensor, "B S"] | None, document_ids: Int[Tensor, "B S"] | None
    ) -> tuple[Bool[Tensor, "B N"] | None, Int[Tensor, "B N"] | None]:
        """Add the padding mask and document ids of S new positions; return those of all positions.

        Raises:
            ConfigError: one that was given before and is missing now, or the other way round.
        """
        given = (mask is not None, document_ids is not None)
        if self._given not in (None, given):
            raise ConfigError("KVCache: give mask and document_ids in every call with this cache, or in none")
        self._given = given
        return (
            None if mask is None else self._mask.extend(mask),
            None if document_ids is None else self._documents.extend(document_ids),
        )
