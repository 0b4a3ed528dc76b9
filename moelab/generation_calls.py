"""The client's calls for text from a run's checkpoint."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from moelab import patience
from moelab.calls import Calls, Json, given


class GenerationCalls(Calls):
    """Asking for text, and looking at what was written."""

    def generate(
        self,
        run_id: int,
        prompt: str = "",
        *,
        tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        step: int | None = None,
        wait_s: float | None = 120.0,
        idempotency_key: str | None = None,
    ) -> Json:
        """Text from a checkpoint of the run, with the experts of each token; waits up to `wait_s` for it (None: does not wait).

        Without `step` the newest checkpoint writes. Raises TimeoutError; look at `state` for how it ended.
        """
        body = given(prompt=prompt, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, step=step)
        made = self._post(f"/runs/{run_id}/generations", body, key=idempotency_key or uuid.uuid4().hex)
        return made if wait_s is None else patience.wait_for_generation(self, made, wait_s)

    def generation(self, run_id: int, generation_id: int) -> Json:
        return self._get(f"/runs/{run_id}/generations/{generation_id}")

    def generations(self, run_id: int, *, limit: int | None = None) -> Iterator[Json]:
        """The run's generations without their texts, newest first."""
        return self._pages(f"/runs/{run_id}/generations", {}, limit)

    def delete_generation(self, run_id: int, generation_id: int) -> None:
        self.http.request("DELETE", f"/runs/{run_id}/generations/{generation_id}")
