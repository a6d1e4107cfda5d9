"""What was decoded last, kept within a bound of memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

# As many photographs as a small folder holds, or eight volumes of 256^3; once for every worker process.
LIMIT_BYTES = 2**29


class Recent:
    """The values last asked for that fit into `limit` bytes together; the newest in any case.

    A copy for another process (by pickle) starts empty.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit, self.nbytes = limit, 0
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, an array or tensor; made where it is not kept."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        value = self._kept[key] = make()
        self.nbytes += value.nbytes
        while self.nbytes > self.limit and len(self._kept) > 1:
            self.nbytes -= self._kept.popitem(last=False)[1].nbytes
        return value

    def __reduce__(self) -> tuple[type["Recent"], tuple[int]]:
        return Recent, (self.limit,)
