"""The engine: schedule, execute, sample, emit. One plain synchronous `step()`."""

import time
from array import array
from collections.abc import Callable, Iterable

from octavo.backends.base import Backend, StepResult
from octavo.config import EngineConfig
from octavo.kv import KVCache, Prefix, Transfers, root_key

from .batch import BatchBuilder
from .messages import EngineInfo, EngineRequest, EngineStats, TokenLogprobs, TokenOutput
from .policies import Policy
from .recovery import Recovery
from .scheduler import Scheduler, StepPlan
from .sequence import Sequence

PATIENCE = (
    0.002  # seconds that a step without work waits for pages on the move: as long as a new request may wait for it
)


class Engine:
    """Generates tokens for many requests at once, on one backend whose KV pool of `num_pages` is allocated.

    Not thread-safe: whoever steps it also adds and aborts. It holds nothing that cannot be rebuilt from the requests
    and the tokens it has given out. `policy`: who is served next; first come, first served by default. `clock` gives
    the time that arrivals are in, in seconds; a simulation's is virtual.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        num_pages: int,
        max_model_len: int,
        max_batch_size: int,
        max_batch_tokens: int,
        policy: Policy | None = None,
        prefix_caching: bool = True,
        transfers: Transfers | None = None,
        preemption: str = "auto",
        fingerprint: str = "",
        speculative_tokens: int = 0,
        clock: Callable[[], float] = time.time,
    ):
        self.backend, self.fingerprint, self.clock = backend, fingerprint, clock
        self.kv = KVCache(num_pages, backend.page_size, prefix_caching, backend.copy_page, transfers)
        self.scheduler = Scheduler(
            self.kv,
            policy or Policy(EngineConfig()),
            Recovery(preemption, backend.page_size),
            max_batch_size,
            max_batch_tokens,
        )
        self.max_model_len = min(max_model_len, num_pages * backend.page_size)
        max_pages = self.kv.pages_for(self.max_model_len)
        self._builder = BatchBuilder(self.scheduler.max_running, max_pages, backend.page_size)
        self._live: dict[str, Sequence] = {}
        self._rejected: list[TokenOutput] = []
        self._speculative_tokens = speculative_tokens
        self._arrivals = 0
        self._steps = self._tokens_computed = self._tokens_generated = self._cached_tokens = 0
        self._guessed_tokens = self._right_guesses = 0
        self._step_seconds = self._backend_seconds = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._rejected) or self.kv.is_moving

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            max_model_len=self.max_model_len,
            vocab_size=self.backend.spec.vocab_size,
            num_pages=self.kv.pool.num_pages,
            page_size=self.kv.page_size,
        )

    def add(self, request: EngineRequest) -> None:
        """Queue a request. One that can never be served comes back from the next step with an error."""
        if problem := self._problem(request):
            self._rejected.append(TokenOutput(request.id, -1, "error", message=problem))
            return
        params, tokens = request.params, array("i", request.prompt + request.output)
        seq = Sequence(
            request=request,
            order=self._arrivals,
            stop_tokens=frozenset(request.eos).union(params.stop_token_ids or ()),
            tokens=tokens,
            prefix=self._prefix(tokens, request.tenant, request.salt),
            num_prompt=len(request.prompt),
            max_tokens=min(len(request.prompt) + (params.max_tokens or self.max_model_len), self.max_model_len),
            guess_limit=self._speculative_tokens if params.speculative_tokens is None else params.speculative_tokens,
        )
        try:
            self.scheduler.add(seq, after=self._live.get(request.after or ""))
        except Exception as error:  # a user's policy may raise anything, and only this request is to suffer
            message = f"the scheduling policy failed: {type(error).__name__}: {error}"
            self._rejected.append(TokenOutput(request.id, -1, "error", message=message))
            return
        self._arrivals += 1
        self._live[request.id] = seq

    def abort(self, ids: Iterable[str]) -> None:
        """Drop requests and free their pages at once. Unknown or finished ids are none of our business."""
        for id in ids:
            if seq := self._live.pop(id, None):
                self.scheduler.abort(seq)

    def pin(self, id: str, tokens: Iterable[int], tenant: str = "", salt: str = "") -> None:
        """Keep the pages of a KV state's tokens, which were computed before, until `unpin` or until room is needed."""
        self.kv.pin(id, self._prefix(array("i", tokens), tenant, salt))

    def unpin(self, id: str) -> None:
        self.kv.unpin(id)

    def step(self) -> list[TokenOutput]:
        """Compute one batch: a new token for each sequence that got to the end of its chunk. [] if there is no work."""
        started = time.perf_counter()
        outputs, self._rejected = self._rejected, []
        self.kv.collect()
        plan = self.scheduler.schedule()
        if plan.sequences:
            batch = self._builder.build(plan)
            execution, before = time.perf_counter(), self.clock()
            result = self.backend.step(batch)
            self._backend_seconds += time.perf_counter() - execution
            self.scheduler.recovery.computed(len(batch.tokens), self.clock() - before)
            outputs += self._advance(plan, result)
            self._steps += 1
        elif not outputs:
            self.kv.wait(PATIENCE)
        self._step_seconds += time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        pool = self.kv.pool
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            free_pages=pool.num_available - pool.num_cached,
            cached_pages=pool.num_cached,
            num_pages=pool.num_pages,
            steps=self._steps,
            preemptions=self.scheduler.preemptions,
            tokens_computed=self._tokens_computed,
            tokens_generated=self._tokens_generated,
            cached_tokens=self._cached_tokens,
            guessed_tokens=self._guessed_tokens,
            right_guesses=self._right_guesses,
            step_seconds=self._step_seconds,
            backend_seconds=self._backend_seconds,
        )

    def close(self) -> None:
        """Save the pages that are being saved, within seconds, and free the backend."""
        self.kv.close()
        self.backend.close()

    def _prefix(self, tokens: "array[int]", tenant: str, salt: str) -> Prefix:
        return Prefix(root_key(self.fingerprint, tenant, salt), tokens, self.kv.page_size)

    def _problem(self, request: EngineRequest) -> str | None:
        """Why a request cannot be served; the frontend has checked all this, and the engine does not take its word."""
        if request.id in self._live:
            return f"there is a live request with the id {request.id!r}"
        if not 0 < len(request.prompt) + len(request.output) < self.max_model_len:
            return f"the prompt must have from 1 to {self.max_model_len - 1} tokens, not {len(request.prompt)}"
        if not all(0 <= token < self.backend.spec.vocab_size for token in request.prompt):
            return f"prompt tokens must be from 0 to {self.backend.spec.vocab_size - 1}"
        return None

    def _advance(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Book what the step computed, append the sampled tokens, end what has ended."""
        outputs: list[TokenOutput] = []
        tokens = result.tokens.tolist()
        row = 0
        for i, (seq, chunk) in enumerate(zip(plan.sequences, plan.chunks, strict=True)):
            ends = plan.ends(i)
            if seq.num_computed < seq.num_prompt <= seq.num_computed + chunk:
                self.scheduler.let_go(seq)
            seq.num_computed += chunk
            self.kv.commit(seq.held, seq.num_computed)
            if ends:
                guesses = plan.guesses.get(i, ())
                outputs.append(self._append(seq, tokens[row], _logprobs(seq, result, row)))
                for ahead, token in enumerate(guesses):
                    if outputs[-1].finish_reason or token != seq.tokens[-1]:
                        break
                    seq.num_computed += 1
                    outputs.append(self._append(seq, tokens[row + ahead + 1], _logprobs(seq, result, row + ahead + 1)))
                    self._right_guesses += 1
                self._guessed_tokens += len(guesses)
                row += 1 + len(guesses)
        self._tokens_computed += sum(plan.chunks)
        self._tokens_generated += len(outputs)
        return outputs

    def _append(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """The sequence's next token, and with it perhaps its end."""
        seq.tokens.append(token)
        if seq.num_outputs == len(seq.request.output) + 1:
            self._cached_tokens += seq.cached_tokens
        reason = message = stop_token = None
        if token < 0:
            reason, message = "error", "the model gave logits that are not numbers"
        elif token in seq.stop_tokens and seq.num_outputs >= seq.request.params.min_tokens:
            reason, stop_token = "stop", token if token not in seq.request.eos else None
        elif len(seq.tokens) >= seq.max_tokens:
            reason = "length"
        if reason:
            del self._live[seq.id]
            self.scheduler.finish(seq)
        return TokenOutput(seq.id, token, reason, stop_token, logprobs, seq.cached_tokens, message)


def _logprobs(seq: Sequence, result: StepResult, row: int) -> TokenLogprobs | None:
    wanted = seq.request.params.logprobs
    if wanted is None or result.logprobs is None or result.ranks is None:
        return None
    top_tokens = result.top_tokens[row, :wanted].tolist() if result.top_tokens is not None else []
    top_logprobs = result.top_logprobs[row, :wanted].tolist() if result.top_logprobs is not None else []
    return TokenLogprobs(float(result.logprobs[row]), int(result.ranks[row]), top_tokens, top_logprobs)
